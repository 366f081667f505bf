"""How the tokens of one answer are drawn at many places at once, for drafts and for the model that verifies them.

Greedy answers, and those with a seed, are drawn by the model at every place as they would be without drafts, each with
that place's own random number, and a draft stands where it is the same token: a seed gives the same answer, drafts or
not. A drafting model then draws with the same random number, so that where both distributions are alike so are their
tokens (coupling, arXiv 2408.07978). For a draft that comes without a distribution this is rejection sampling too: it
stands with probability p(x).

Without a seed, drafts that come with a distribution are accepted by `edger1.drafting.rejection`, where more stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from edger1 import sampling
from edger1.drafting.passes import Keys
from edger1.drafting.rejection import Probabilities, accept, draw
from edger1.sampling import RandomState, RandomTurn, Sampler


class Draws:
    """The draws of one answer."""

    def __init__(self, sampler: Sampler, random: RandomState, turn: RandomTurn, *, seeded: bool) -> None:
        self._sampler, self._random, self._turn = sampler, random, turn
        self.coupled = seeded or sampler.greedy
        """Whether the answer is token by token the one without drafts."""
        self._keys: Keys = []

    @cached_property
    def _generator(self) -> np.random.Generator:
        # NumPy's random numbers take 3 MB and a moment, and most answers need none.
        return np.random.default_rng()

    @property
    def lazy(self) -> bool:
        """Whether the next draft can be drawn before the last one is read."""
        return self.coupled and not self._sampler.looks_back

    @property
    def together(self) -> bool:
        """Whether all places of a pass can be drawn before any of them is read."""
        return self.lazy and (self._sampler.greedy or sampling.kernels() is not None)

    def begin(self, places: int, after: Keys | None = None) -> Keys:
        """Begin a step that draws at `places` places, one that follows a step in which all of `after` were drawn.

        Returns what it draws with, for `resume`.
        """
        self._keys = []
        if not self._sampler.greedy and sampling.kernels() is not None:
            self._turn.pause(self._random)
            state = RandomState(after[-1][1] if after else self._random.key)
            for _ in range(places):
                key = state.next_key(sampling.kernels())
                self._keys.append((key, state.key))
        return self._keys

    def resume(self, keys: Keys) -> None:
        """Go on with a step that was begun earlier."""
        self._keys = keys

    def draft(self, logits: Any, place: int, tokens: Sequence[int]) -> tuple[Any, Probabilities | None]:
        """Draw the draft for a place from a drafting model's `logits` [1, V], after `tokens`.

        Returns its id, shape (1,), unread yet, and the distribution [V] that it came from where that is asked for.
        """
        import mlx.core as mx

        if not self.coupled:
            q = self._sampler.probabilities(logits, [tokens])[0]
            return mx.array([draw(q, self._generator)], mx.uint32), q
        if self._keys:
            row = self._sampler.row(list(tokens), self._keys[place][0])
            return sampling.kernels().draw_tokens(logits.astype(mx.float32), [row], None), None
        if self._sampler.looks_back and tokens:
            logits = self._sampler.penalized(logits, list(tokens))
        return mx.argmax(logits, axis=-1).astype(mx.uint32), None

    def verify(
        self, logits: Any, drafts: Any, known: Sequence[int], q: Probabilities | None
    ) -> tuple[list[int], list[int]]:
        """Return the drafts, read, and what is said: those that stand and one token more.

        logits [drafts + 1, V] are the model's at each draft's place and behind; drafts (uint32, [drafts]), or a list.
        """
        import mlx.core as mx

        if q is not None and not self.coupled:
            tokens = _read(drafts)
            p = self._sampler.probabilities(logits, _contexts(known, tokens))
            # A drafting model may have no more logits than tokens, and what it never says it says with probability 0.
            q = np.pad(q, ((0, 0), (0, p.shape[1] - q.shape[1])))
            stood, following = accept(tokens, p, q, self._generator)
            return tokens, [*tokens[:stood], following]
        if not self._sampler.looks_back and (self._sampler.greedy or self._keys):
            following = self._together(logits, None)
            mx.eval(following)
            tokens, drawn = _read(drafts), following.tolist()
        else:
            tokens = _read(drafts)
            contexts = _contexts(known, tokens)
            if self._sampler.greedy or self._keys:
                drawn = self._together(logits, contexts).tolist()
            else:
                drawn = self._one_by_one(logits, tokens, contexts)
        return tokens, self.said(tokens, drawn)

    def drawn(self, logits: Any) -> Any:
        """Draw at all places of a pass, where that is possible (`together`); returns uint32 [places], unread."""
        return self._together(logits, None)

    def said(self, drafts: Sequence[int], drawn: Sequence[int]) -> list[int]:
        """Return what is said of the tokens drawn: as many as there are drafts that stand, and one more."""
        stood = 0
        while stood < len(drafts) and drafts[stood] == drawn[stood]:
            stood += 1
        if self._keys:
            self._random.key = self._keys[stood][1]
        return list(drawn[: stood + 1])

    def _together(self, logits: Any, contexts: Sequence[Sequence[int]] | None) -> Any:
        import mlx.core as mx

        count = logits.shape[0]
        kernels = sampling.kernels()
        if self._sampler.greedy and not self._sampler.looks_back:
            return mx.argmax(logits, axis=-1).astype(mx.uint32)
        seen: Sequence[Sequence[int]] = contexts or [[]] * count
        if kernels is None:
            penalized = [self._sampler.penalized(logits[i : i + 1], list(seen[i])) for i in range(count)]
            return mx.argmax(mx.concatenate(penalized), axis=-1).astype(mx.uint32)
        keys = [key for key, _ in self._keys[:count]] or [0] * count
        rows = [self._sampler.row(list(tokens), key) for tokens, key in zip(seen, keys, strict=True)]
        return kernels.draw_tokens(logits.astype(mx.float32), rows, None)

    def _one_by_one(self, logits: Any, drafts: Sequence[int], contexts: Sequence[Sequence[int]]) -> list[int]:
        """Draw as plain decoding does, until a draft does not stand."""
        drawn: list[int] = []
        self._turn.take(self._random)
        for i, tokens in enumerate(contexts):
            token: Any = self._sampler(logits[i : i + 1], list(tokens)).item()
            drawn.append(int(token))
            if i < len(drafts) and drafts[i] != drawn[-1]:
                break
        return drawn


def _read(drafts: Any) -> list[int]:
    return list(drafts) if isinstance(drafts, list) else [int(token) for token in drafts.tolist()]


def _contexts(known: Sequence[int], drafts: Sequence[int]) -> list[list[int]]:
    """Return the tokens before each draft, and before what follows the last: as many as a penalty looks back on."""
    recent = [*known[-sampling.REPETITION_WINDOW :], *drafts]
    first = len(recent) - len(drafts)
    return [recent[: first + i] for i in range(len(drafts) + 1)]
