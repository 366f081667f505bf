"""Distillation of logits: the student's next-token distribution drawn towards a teacher's, on the same text.

For a counted token with teacher p and student q, both of logits divided by a temperature T, and K the teacher's k
likeliest tokens:

    KL = sum over K of p_i log(p_i / q_i)  +  p_rest log(p_rest / q_rest)
    loss = share T^2 KL + (1 - share) (-log q(token) at T = 1)

which is forward KL (Hinton et al. 2015, with its T^2) with all tokens outside K taken as one. That last term keeps what
the teacher thinks unlikely unlikely; without it the student could put any mass there. Of the teacher only k numbers a
token are kept, so it is asked once a document and need not stay in memory; what it said lies in a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from edger1.errors import FormatError, UsageError
from edger1.train.finetune.distill_settings import DistillSettings
from edger1.train.finetune.method import Batch, Evaluation, Method, Policy, Step
from edger1.train.store import Store, key_of

CHUNK_BYTES = 64 << 20
"""Of logits in f32 that the loss works on at once."""


@dataclass(frozen=True)
class Top:
    """The teacher's likeliest tokens where tokens count: both [counted, k], likeliest first."""

    indices: np.ndarray
    """int32."""
    logprobs: np.ndarray
    """f32, at the temperature, of the distribution over all tokens."""


class Teacher(Protocol):
    """A model that gives logits; a policy without an adapter is one."""

    def logits(self, batch: Batch) -> mx.array:
        """Return f32 [counted, vocabulary]."""

    def close(self) -> None:
        """Give its memory back."""


class LogitDistill:
    """Distillation as the loop sees it: the batches of SFT, another loss.

    data: SFT over the same settings. open_teacher: loads the teacher, called when something is not in the file.
    identity: the teacher, for the file. vocabulary: how many logits the student has.
    """

    name = "distill"

    def __init__(
        self,
        data: Method,
        held_out: Sequence[Batch],
        settings: DistillSettings,
        open_teacher: Callable[[], Teacher],
        identity: str,
        vocabulary: int,
    ) -> None:
        settings.check()
        self._data = data
        self._held_out = held_out
        self._settings = settings
        self._open_teacher = open_teacher
        self._identity = identity
        self._vocabulary = vocabulary
        self._teacher: Teacher | None = None
        self._asked = False
        self._path = Path(settings.cache) if settings.cache else None
        self._store: Store | None = None
        self._known: dict[str, Top] = {}

    def log_to(self, run: Path) -> None:
        """Keep what the teacher says in a run's folder, unless the settings name a file."""
        self._path = self._path or run / "cache" / "teacher.sqlite"

    def describe(self) -> list[str]:
        """Return the plan's lines."""
        s = self._settings
        where = f"kept in {s.cache}" if s.cache else "kept in the run"
        rest = f", {1 - s.share:.3g} cross entropy" if s.share < 1 else ""
        return [
            *self._data.describe(),
            f"teacher {s.teacher}, its {min(s.top, self._vocabulary)} likeliest of {self._vocabulary:,} tokens {where}",
            f"loss: {s.share:g} KL at temperature {s.temperature:g}{rest}",
        ]

    def step(self, policy: Policy, step: int) -> Step:
        """Return SFT's batches with the teacher's likeliest tokens: extra["top"] int32, extra["logprobs"] f32, both
        [counted, k]."""
        found = self._data.step(policy, step)
        batches = [self._with_teacher(batch) for batch in found.batches]
        self._drop_teacher()
        return replace(found, batches=batches)

    def loss(self, policy: Policy, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the batch's part of the loss, and of `kl` (at the temperature, without its square) and
        `cross_entropy`, all in nats a token."""
        logits = policy.logits(batch)
        weights = mx.array(batch.weights[batch.weights != 0])
        targets = mx.array(batch.ids[batch.weights != 0])
        top, known = mx.array(batch.extra["top"]), mx.array(batch.extra["logprobs"])
        s, kl, cross = self._settings, mx.array(0.0), mx.array(0.0)
        rows = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
        for first in range(0, logits.shape[0], rows):
            some = slice(first, first + rows)
            # Computed again backwards, so that of a chunk's arrays none waits for that.
            part = mx.checkpoint(partial(_divergences, targets[some], top[some], known[some], s.temperature))
            each = part(logits[some])
            kl = kl + (each[0] * weights[some]).sum()
            cross = cross + (each[1] * weights[some]).sum()
        loss = s.share * s.temperature**2 * kl + (1 - s.share) * cross
        return loss, {"kl": mx.stop_gradient(kl), "cross_entropy": mx.stop_gradient(cross)}

    def evaluate(self, policy: Policy, step: int) -> Evaluation | None:
        """Return SFT's figures and answers on held-out data, and the divergence there, of which less is better."""
        found = self._data.evaluate(policy, step)
        if found is None or not self._held_out:
            return found
        kl = count = 0.0
        for batch in self._held_out:
            _, figures = self.loss(policy, self._with_teacher(batch))
            kl += float(figures["kl"].item())
            count += float(batch.weights.sum())
        self._drop_teacher()
        kl /= max(count, 1.0)
        return replace(found, figures={**found.figures, "kl": kl}, better=-kl)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return nothing: a step follows from its number, and what the teacher said is on disk."""
        return {}, {}

    def restore(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take up nothing."""

    def _with_teacher(self, batch: Batch) -> Batch:
        tops = [self._top(document) for document in documents_of(batch)]
        indices = np.concatenate([top.indices for top in tops])
        logprobs = np.concatenate([top.logprobs for top in tops])
        return replace(batch, extra={**batch.extra, "top": indices, "logprobs": logprobs})

    def _top(self, document: Batch) -> Top:
        s = self._settings
        digest = sha256(document.ids.tobytes() + (document.weights != 0).tobytes()).hexdigest()
        width = min(s.top, self._vocabulary)
        key = key_of("top", self._identity, digest, width, s.temperature, self._vocabulary)
        if self._store is None and self._path is not None:
            self._store = Store(self._path)
        if self._store is None and key in self._known:
            return self._known[key]
        kept = self._store.get(key) if self._store is not None else None
        count = int((document.weights != 0).sum())
        if kept is not None:
            return _unpacked(kept, count, width)
        self._asked = True
        if self._teacher is None:
            self._teacher = self._open_teacher()
        found = likeliest(self._teacher.logits(document), width, s.temperature, self._vocabulary)
        if self._store is None:
            self._known[key] = found
            return found
        packed = found.indices.astype("<i4").tobytes() + found.logprobs.astype("<f4").tobytes()
        return _unpacked(self._store.add(key, packed), count, width)

    def _drop_teacher(self) -> None:
        """Give the teacher's memory back once it had nothing to do, as after an epoch."""
        if self._teacher is not None and not self._asked:
            self._teacher.close()
            self._teacher = None
        self._asked = False


def documents_of(batch: Batch) -> Iterator[Batch]:
    """Yield the documents of a batch that count, each a row of its own, in the order of their tokens."""
    for ids, documents, weights in zip(batch.ids, batch.documents, batch.weights, strict=True):
        for number in dict.fromkeys(documents[documents >= 0].tolist()):
            of = documents == number
            if (weights[of] != 0).any():
                yield Batch(ids[of][None], np.zeros((1, int(of.sum())), np.int32), weights[of][None])


def likeliest(logits: mx.array, count: int, temperature: float, vocabulary: int) -> Top:
    """Return the `count` likeliest tokens of logits [N, V], likeliest first.

    Of the logits the first `vocabulary` are real: models pad theirs to different widths.
    """
    indices, logprobs = [], []
    rows = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    for first in range(0, logits.shape[0], rows):
        some = logits[first : first + rows, :vocabulary].astype(mx.float32) / temperature
        some = some - mx.logsumexp(some, axis=-1, keepdims=True)
        some_indices = mx.argpartition(-some, kth=count - 1, axis=-1)[:, :count]
        values = mx.take_along_axis(some, some_indices, axis=-1)
        order = mx.argsort(-values, axis=-1)
        indices.append(np.array(mx.take_along_axis(some_indices, order, axis=-1)).astype(np.int32))
        logprobs.append(np.array(mx.take_along_axis(values, order, axis=-1)))
    return Top(np.concatenate(indices), np.concatenate(logprobs))


def _divergences(
    targets: mx.array, top: mx.array, known: mx.array, temperature: float, logits: mx.array
) -> list[mx.array]:
    """Return KL and cross entropy of each token, f32 [N], in nats.

    targets int32 [N]; top int32 and known f32 [N, k]: the teacher's likeliest tokens and their log-probabilities at the
    temperature; logits [N, V].
    """
    whole = mx.logsumexp(logits, axis=-1)
    cross = whole - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    heated = logits / temperature
    total = mx.logsumexp(heated, axis=-1)
    p = mx.exp(known)
    q = mx.take_along_axis(heated, top, axis=-1) - total[:, None]
    kl = (p * (known - q)).sum(axis=-1)
    if top.shape[-1] < logits.shape[-1]:
        rest = mx.clip(1 - p.sum(axis=-1), 1e-30, 1)
        # Not 1 less the sum of q, of which little is left where the student is sure.
        others = mx.put_along_axis(heated, top, mx.full(top.shape, -mx.inf), axis=-1)
        kl = kl + rest * (mx.log(rest) - (mx.logsumexp(others, axis=-1) - total))
    return [kl, cross]


def check_tokenizers(teacher: Any, student: Any, name: str) -> None:
    """Raise UsageError where two tokenizers are not the same: what a token means must not differ."""
    theirs, ours = (dict(of.get_vocab()) for of in (teacher, student))
    if theirs == ours:
        return
    hint = "Logits are distilled between models of one family; edger1 distill works with any teacher."
    if len(theirs) != len(ours):
        raise UsageError(f"{name} has {len(theirs):,} tokens, and the student {len(ours):,}. {hint}")
    word = next(word for word in sorted(ours) if theirs.get(word) != ours[word])
    raise UsageError(
        f"{name} has another tokenizer than the student: {word!r} is token {theirs.get(word, 'none')}, not "
        f"{ours[word]}. {hint}"
    )


def _unpacked(kept: bytes, count: int, width: int) -> Top:
    if len(kept) != 8 * count * width:
        raise FormatError("The file of what the teacher said is damaged; move it away to ask the teacher again.")
    half = len(kept) // 2
    return Top(
        np.frombuffer(kept[:half], "<i4").reshape(count, width), np.frombuffer(kept[half:], "<f4").reshape(count, width)
    )
