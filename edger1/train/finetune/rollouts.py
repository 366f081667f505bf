"""Groups of completions sampled together, with the log-probability of each token.

A prompt passes the model once, and each row of its group begins with a copy of that cache. Rows of all prompts decode
in one batch, over mlx-lm's batched caches; where one has ended the next takes its place. mlx-lm's BatchGenerator has
one random state for all rows, keeps a row of log-probabilities over the vocabulary for every token, and divides by no
temperature there, which is why the loop is written here.

Which tokens a row gets depends on its own key, which comes from a seed, the prompt's number and the row's, and on the
model. It does not depend on what else is decoded: the kernels give a row the same bits among up to 16 as alone. Where a
model does not run on them as one operation, rounding may decide otherwise between two tokens that are equally likely.

Tokens are drawn from softmax(logits / temperature) over the whole vocabulary. There is no top-p, top-k or penalty:
they would make what is sampled another distribution than the one whose log-probabilities a loss is about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edger1.batch import MOST_ROWS
from edger1.errors import MemoryCeilingError, UsageError

if TYPE_CHECKING:
    import mlx.core as mx

    from edger1.train.finetune.method import Policy

PREFILL_TOKENS = 512
"""Tokens of a prompt that pass the model at once."""


@dataclass(frozen=True)
class Prompt:
    """A prompt in the model's tokens, and the row of data that it comes from."""

    id: str
    """The row, for messages and logs: a file and line, or a number."""
    messages: list[dict[str, Any]] | str
    """The messages, or raw text that is continued."""
    ids: tuple[int, ...]
    text: str
    """What `ids` say, the template's part included."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, for rewards."""


@dataclass(frozen=True)
class Decoding:
    """How completions are sampled."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the likeliest token; log-probabilities are those at temperature 1 then."""
    rows: int = MOST_ROWS
    """Completions that are decoded together, at most."""
    cache_bytes: int = 0
    """What the caches of all rows may take together; 0 is no limit."""


@dataclass(frozen=True)
class Rollout:
    """A completion of a prompt."""

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    """Its tokens; the last is the one that ends it where `finished`."""
    logprobs: np.ndarray
    """f32 [len(ids)]: natural log-probability of each under the distribution that it was drawn from."""
    text: str
    """Its text, without the token that ends it."""
    finished: bool
    """Whether the model ended it, rather than the limit on tokens."""


def make_prompt(id: str, messages: list[dict[str, Any]] | str, columns: dict[str, Any], tokenizer: Any) -> Prompt:
    """Return a prompt with the model's chat template around messages; raw text is taken as it is.

    Raises UsageError where the model has no template for messages, or the prompt is empty.
    """
    if isinstance(messages, str):
        text = messages
        ids = tokenizer.encode(text)
    else:
        if not getattr(tokenizer, "has_chat_template", True):
            raise UsageError(f"{id} is a chat, and the model has no chat template; give it text to go on with instead.")
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise UsageError(f"{id} is empty; a prompt has at least one token.")
    return Prompt(id, messages, tuple(int(i) for i in ids), text, columns)


def roll_out(
    policy: Policy,
    prompts: Sequence[Prompt],
    group: int,
    decoding: Decoding,
    seed: int,
    numbers: Sequence[int] | None = None,
) -> list[Rollout]:
    """Return `group` completions for each prompt, those of a prompt next to one another.

    `numbers` tell the prompts' random numbers apart, 0, 1, ... by default: the same seed, number and row give the same
    completion. Raises MemoryCeilingError where the caches of one row do not fit.
    """
    tokenizer = policy.tokenizer
    ends = frozenset(int(i) for i in tokenizer.eos_token_ids)
    rows = [
        _Row(prompt, _keys(seed, number, row, decoding))
        for prompt, number in zip(prompts, range(len(prompts)) if numbers is None else numbers, strict=True)
        for row in range(group)
    ]
    # A policy that can ready itself for many tokens says so.
    with getattr(policy, "merged", policy.generation)() as model:
        _decode(model, rows, ends, decoding)
    return [
        Rollout(
            row.prompt.ids,
            tuple(row.ids),
            np.array(row.logprobs, dtype=np.float32),
            tokenizer.decode(row.ids[:-1] if row.finished else row.ids),
            row.finished,
        )
        for row in rows
    ]


class _Row:
    """A completion that is being sampled."""

    def __init__(self, prompt: Prompt, keys: np.ndarray) -> None:
        self.prompt = prompt
        self.keys = keys
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finished = False

    @property
    def last(self) -> int:
        """The token that is fed next."""
        return self.ids[-1] if self.ids else self.prompt.ids[-1]


def _keys(seed: int, number: int, row: int, decoding: Decoding) -> np.ndarray:
    """Return uint64 [max_tokens]: a key for each draw of a row."""
    if not decoding.temperature:
        return np.zeros(decoding.max_tokens, dtype=np.uint64)
    return np.random.SeedSequence((seed, number, row)).generate_state(decoding.max_tokens, np.uint64)


def _decode(model: Any, rows: Sequence[_Row], ends: frozenset[int], decoding: Decoding) -> None:
    """Complete all rows, those of a prompt being neighbours."""
    waiting = deque(rows)
    batch = _Batch(model, decoding)
    together = _together(model, rows, decoding)
    while waiting or batch.rows:
        joining = [waiting.popleft() for _ in range(min(len(waiting), together - len(batch.rows)))]
        batch.join(joining)
        ended = []
        for i, (row, token, logprob) in enumerate(batch.step()):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.finished = token in ends
            if row.finished or len(row.ids) == decoding.max_tokens:
                ended.append(i)
        batch.leave(ended)


def _together(model: Any, rows: Sequence[_Row], decoding: Decoding) -> int:
    """Return how many rows may be decoded together."""
    if not decoding.cache_bytes:
        return decoding.rows
    from edger1.kv_layout import kv_layout

    longest = max(len(row.prompt.ids) for row in rows) + decoding.max_tokens
    each = kv_layout(model, 4, PREFILL_TOKENS).nbytes(longest)
    # Joining and leaving hold one layer of all rows twice, and the next prompt is there beside them.
    fitting = decoding.cache_bytes // each - 1
    if fitting < 1:
        raise MemoryCeilingError(
            f"The cache of a completion takes {each / 1e6:,.0f} MB at {longest:,} tokens, and two of them do not fit "
            f"into {decoding.cache_bytes / 1e6:,.0f} MB; lower max_tokens or allow more memory."
        )
    return min(decoding.rows, fitting)


class _Batch:
    """Rows that are decoded together, their caches side by side."""

    def __init__(self, model: Any, decoding: Decoding) -> None:
        self.rows: list[_Row] = []
        self._model = model
        self._decoding = decoding
        self._caches: list[Any] = []
        # The prompt that was read last, and its cache: a group may join in several parts.
        self._read: tuple[Prompt, list[Any]] | None = None

    def join(self, rows: Sequence[_Row]) -> None:
        """Take rows in."""
        import mlx.core as mx

        start = 0
        for i in range(1, len(rows) + 1):
            if i < len(rows) and rows[i].prompt is rows[start].prompt:
                continue
            own = self._prompt_cache(rows[start].prompt)
            merged = [type(cache).merge([cache] * (i - start)) for cache in own]
            for k, cache in enumerate(merged):
                if self._caches:
                    self._caches[k].extend(cache)
                    merged[k] = self._caches[k]
                # A layer at a time, so that no second copy of all layers is ever there.
                mx.eval(merged[k].state)
            self._caches = merged
            self.rows += rows[start:i]
            start = i

    def leave(self, places: Sequence[int]) -> None:
        """Let go of the rows at these places."""
        import mlx.core as mx

        if not places:
            return
        stay = [i for i in range(len(self.rows)) if i not in places]
        self.rows = [self.rows[i] for i in stay]
        if not stay:
            self._caches = []
        for cache in self._caches:
            cache.filter(mx.array(stay))
            mx.eval(cache.state)

    def step(self) -> list[tuple[_Row, int, float]]:
        """Draw a token for each row; returns rows, tokens and their log-probabilities."""
        import mlx.core as mx

        last = mx.array([row.last for row in self.rows], dtype=mx.uint32)
        logits = self._model(last[:, None], cache=self._caches)[:, -1, :].astype(mx.float32)
        temperature = self._decoding.temperature
        tokens = _draw(logits, [int(row.keys[len(row.ids)]) for row in self.rows], temperature)
        scaled = logits * (1 / temperature) if temperature else logits
        logprobs = mx.take_along_axis(scaled, tokens[:, None], axis=-1)[:, 0] - mx.logsumexp(scaled, axis=-1)
        mx.eval(tokens, logprobs)
        drawn: Any = tokens.tolist()
        scores: Any = logprobs.tolist()
        return list(zip(self.rows, drawn, scores, strict=True))

    def _prompt_cache(self, prompt: Prompt) -> list[Any]:
        """Return the caches of a prompt without its last token, which the rows are fed first."""
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        if self._read is None or self._read[0] is not prompt:
            self._read = None
            caches = make_prompt_cache(self._model)
            ids = prompt.ids[:-1]
            for first in range(0, len(ids), PREFILL_TOKENS):
                # The logits are never evaluated.
                self._model(mx.array([ids[first : first + PREFILL_TOKENS]]), cache=caches)
                mx.eval([cache.state for cache in caches])
            if not all(hasattr(cache, "merge") for cache in caches):
                raise UsageError("This model's caches cannot be put side by side, and completions are sampled so.")
            self._read = prompt, caches
        return self._read[1]


def _draw(logits: mx.array, keys: list[int], temperature: float) -> mx.array:
    """Return uint32 [rows]: a token for each row of logits f32 [rows, V], with its own key."""
    import mlx.core as mx

    from edger1.sampling import kernels

    if not temperature:
        return mx.argmax(logits, axis=-1).astype(mx.uint32)
    extension = kernels()
    if extension is not None:
        drawn: mx.array = extension.draw_tokens(logits, [(key, 1 / temperature, 0.0, 0.0, 0, 1.0, []) for key in keys])
        return drawn
    scaled = logits * (1 / temperature)
    rows = [mx.random.categorical(scaled[i : i + 1], key=mx.random.key(key)) for i, key in enumerate(keys)]
    return mx.concatenate(rows).astype(mx.uint32)
