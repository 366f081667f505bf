"""Embeddings, output head and routers of a random model whose routing is skewed and repeats as that of trained models.

Which experts a token uses must follow from the weights alone, since every engine runs them unmodified. Therefore:

- Each token has a topic and a word beside what is its own: embedding = a COMMON + b TOPIC + c WORD + d OWN, parts of
  independent normal numbers. Layers add little to it, so that a router sees the embedding and a little noise.
- A router's row is a random direction plus a multiple of COMMON, which makes an expert liked or disliked whatever the
  token: a logit is popularity + topic + word + own, each normal, with the standard deviations in `Law`.
- The output head's row of a token is the OWN part of the token that comes before it in `Text`. Decoding greedily, the
  model therefore recites that text, on every engine the same: topics that go on for some tokens, words by Zipf's law.

`Law`'s numbers are such that an LRU cache of 50%, 25% and 12.5% of 128 experts (8 a token) is hit at 0.88, 0.69 and
0.43, near what users of streaming engines report of trained models; `measure` tells it of any trace of routes.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]

COMMON_ENERGY = 0.1
"""Share of an embedding's energy that all tokens have in common."""


@dataclass(frozen=True)
class Law:
    """Standard deviations of the parts of a router's logits, and how topics and words of the text are drawn."""

    popularity: float = 0.6
    topic: float = 0.7
    word: float = 0.7
    own: float = 0.6
    topics: int = 64
    words: int = 1000
    topic_tokens: float = 16.0
    """Mean length of a stretch of one topic, which is geometrically distributed."""

    @property
    def gain(self) -> float:
        """What a router makes of a unit of an embedding's energy outside the common part."""
        varied: float = np.hypot(np.hypot(self.topic, self.word), self.own) / np.sqrt(1 - COMMON_ENERGY)
        return float(varied)


@dataclass(frozen=True)
class Text:
    """An endless text over some of the tokens of a vocabulary, each of which has one successor.

    `order` are the token ids in the order of the text, which begins anew after the last; `topic` and `word` are those
    of each id of the whole vocabulary.
    """

    order: Integers
    topic: Integers
    word: Integers

    def successors(self) -> Integers:
        """Return the id that follows each id; -1 for ids outside the text."""
        following = np.full(len(self.topic), -1, np.int64)
        following[self.order] = np.roll(self.order, -1)
        return following

    def recited(self, after: int, count: int) -> list[int]:
        """Return the `count` ids that follow the id `after`."""
        begin = int(np.flatnonzero(self.order == after)[0]) + 1
        return [int(token) for token in np.take(self.order, range(begin, begin + count), mode="wrap")]


def text(law: Law, vocabulary: int, tokens: Sequence[int], rng: np.random.Generator) -> Text:
    """Draw a text over the ids `tokens` of a vocabulary; ids outside it get a topic and a word all the same."""
    order = rng.permutation(np.asarray(tokens, np.int64))
    stretches = rng.geometric(1 / law.topic_tokens, len(order))
    topics = np.repeat(rng.integers(0, law.topics, len(order)), stretches)[: len(order)]
    zipf = 1 / np.arange(1, law.words + 1)
    topic = rng.integers(0, law.topics, vocabulary)
    word = rng.choice(law.words, vocabulary, p=zipf / zipf.sum())
    topic[order] = topics
    return Text(order, topic, word)


@dataclass
class Directions:
    """The parts that embeddings are made of, rows of normal numbers: [hidden], [topics, hidden], [words, hidden]."""

    law: Law
    text: Text
    hidden: int
    seed: int = 0
    common: Floats = field(init=False)
    topics: Floats = field(init=False)
    words: Floats = field(init=False)
    own: npt.NDArray[np.float16] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.seed, 1])
        self.common = rng.standard_normal(self.hidden, np.float32)
        self.topics = rng.standard_normal((self.law.topics, self.hidden), np.float32)
        self.words = rng.standard_normal((self.law.words, self.hidden), np.float32)
        # The only large one: half the size, in pieces, and for no ids that are never used.
        self.own = np.empty((int(self.text.order.max()) + 1, self.hidden), np.float16)
        for begin in range(0, len(self.own), 4096):
            piece = self.own[begin : begin + 4096]
            piece[:] = rng.standard_normal(piece.shape, np.float32)

    def embeddings(self, ids: Integers) -> Floats:
        """Return the embeddings of some ids [ids, hidden], of about unit size in each number."""
        parts = np.array([self.law.topic, self.law.word, self.law.own], np.float32) / self.law.gain
        made: Floats = np.sqrt(np.float32(COMMON_ENERGY)) * self.common + parts[2] * self._own(ids)
        made += parts[0] * self.topics[self.text.topic[ids]]
        made += parts[1] * self.words[self.text.word[ids]]
        return made

    def heads(self, ids: Integers) -> Floats:
        """Return the output head's rows of some ids [ids, hidden]; those outside the text are never the largest."""
        before = np.full(len(self.text.topic), -1, np.int64)
        before[np.roll(self.text.order, -1)] = self.text.order
        made = self._own(before[ids]) / np.float32(self.hidden**0.5)
        made[before[ids] < 0] *= 0.1
        return made

    def _own(self, ids: Integers) -> Floats:
        return self.own[ids % len(self.own)].astype(np.float32)

    def router(self, layer: int, experts: int) -> Floats:
        """Return one layer's router [experts, hidden], for the normalized sum of embedding and what layers added."""
        rng = np.random.default_rng([self.seed, 2, layer])
        rows = rng.standard_normal((experts, self.hidden), np.float32)
        rows *= np.float32(self.law.gain / self.hidden**0.5)
        liked = rng.standard_normal(experts, np.float32)
        share = self.law.popularity / (COMMON_ENERGY**0.5 * self.hidden)
        made: Floats = rows + np.float32(share) * liked[:, None] * self.common
        return made

    def routes(self, ids: Integers, layer: int, experts: int, top_k: int) -> Integers:
        """Return the experts of some tokens [ids, top_k] as the weights alone say it, without what layers add."""
        x = self.embeddings(ids)
        x /= np.sqrt((x * x).mean(axis=1, keepdims=True))
        return np.argsort(-(x @ self.router(layer, experts).T), axis=1)[:, :top_k]


@dataclass(frozen=True)
class Skew:
    """How uneven one layer's routes are, and how much they repeat."""

    share_of_top_quarter: float
    """Share of all uses that fall on the quarter of the experts used most."""
    kept_from_token_to_token: float
    """Share of a token's experts that the token before used too."""
    lru_50: float
    lru_25: float
    lru_12: float
    """Hit rates of LRU with room for so many percent of the experts, after the first fifth of the tokens."""


def measure(routes: Integers, experts: int) -> Skew:
    """Measure routes [tokens, top_k] of one layer."""
    uses = np.sort(np.bincount(routes.ravel(), minlength=experts))[::-1]
    kept = [len(np.intersect1d(a, b)) / len(b) for a, b in itertools.pairwise(routes)]
    return Skew(
        share_of_top_quarter=float(uses[: experts // 4].sum() / uses.sum()),
        kept_from_token_to_token=float(np.mean(kept)),
        lru_50=lru_hit_rate(routes, experts // 2),
        lru_25=lru_hit_rate(routes, experts // 4),
        lru_12=lru_hit_rate(routes, experts // 8),
    )


def lru_hit_rate(routes: Integers, slots: int) -> float:
    """Return the hit rate of LRU over routes [tokens, top_k], the first fifth of the tokens not counted."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for number, chosen in enumerate(routes.tolist()):
        for expert in chosen:
            if number >= len(routes) // 5:
                asked += 1
                hits += expert in held
            held[expert] = None
            held.move_to_end(expert)
            if len(held) > slots:
                held.popitem(last=False)
    return hits / asked
