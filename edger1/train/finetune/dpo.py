"""Direct preference optimisation: an answer made likelier than another one, measured against the model without adapter.

With d = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)) for a chosen answer y_w and a rejected y_l:

    sigmoid       -(1 - s) log sigma(beta d) - s log sigma(-beta d)     Rafailov et al. 2023, equation 7; s > 0 is
                                                                        conservative DPO (Mitchell 2023)
    sigmoid_norm  the same of d with each half divided by its length    length-normalised DPO, as Tulu 3 has it
    ipo           (d - 1 / (2 beta))^2, each half divided by its length Azar et al. 2023, equation 17; the division is
                                                                        what its authors advised TRL to do
    robust        the sigmoid loss freed of the bias that wrong labels  Chowdhury et al. 2024
                  in a share s of the pairs bring

The reference is the same model with its adapter off, so that no second model is ever loaded. Its log-probabilities are
computed once a pair and kept on disk. Both halves of a pair lie in one row, and attention stays within each.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.train.finetune.dpo_settings import DpoSettings
from edger1.train.finetune.method import Batch, Evaluation, Policy, Step
from edger1.train.finetune.pairs import Pair, Pairs, pack
from edger1.train.store import Store, key_of

CACHE = "cache"
"""Folder of a run for what could be computed again."""
_BY_LENGTH = ("sigmoid_norm", "ipo")


@dataclass(frozen=True)
class Arrangement:
    """How pairs become batches."""

    length: int
    """Tokens of a row that several pairs share; a longer pair has a row of its own."""
    rows: int
    """Rows of a batch."""
    seed: int


class Dpo:
    """DPO as the loop sees it.

    identity: what the reference's log-probabilities depend on besides the pair: the model and its precision. lines:
    what the plan says about the data. Within a run the reference is kept in RUN/cache/references.sqlite.
    """

    name = "dpo"

    def __init__(
        self,
        pairs: Pairs,
        held_out: Pairs | None,
        settings: DpoSettings,
        arrangement: Arrangement,
        identity: str,
        *,
        pad: int = 0,
        lines: Sequence[str] = (),
    ) -> None:
        settings.check()
        self._pairs = pairs
        self._held_out = held_out
        self._settings = settings
        self._arrangement = arrangement
        self._identity = identity
        self._pad = pad
        self._lines = list(lines)
        self._path: Path | None = None
        self._references: Store | None = None
        self._known: dict[str, tuple[float, float]] = {}
        self._order: tuple[int, np.ndarray] | None = None

    def log_to(self, run: Path) -> None:
        """Keep reference log-probabilities in a run's folder from here on."""
        self._path = run / CACHE / "references.sqlite"

    def describe(self) -> list[str]:
        """Return the plan's lines."""
        s = self._settings
        lines = [*self._lines, *self._pairs.lines()]
        if self._held_out is not None:
            lines.append(f"{len(self._held_out.pairs):,} pairs held out")
        smoothed = f", label smoothing {s.label_smoothing:g}" if s.label_smoothing else ""
        return [*lines, f"{s.loss} loss, beta {s.beta:g}{smoothed}; the reference is the model without its adapter"]

    def step(self, policy: Policy, step: int) -> Step:
        """Return the next pairs in the shuffled order of their epoch, reference log-probabilities added."""
        first = step * self._settings.pairs
        chosen = [self._pair(at) for at in range(first, first + self._settings.pairs)]
        batches = self._batches(policy, chosen)
        epoch = (first + self._settings.pairs) / len(self._pairs.pairs)
        return Step(batches, int(sum((batch.weights > 0).sum() for batch in batches)), {"epoch": epoch})

    def loss(self, policy: Policy, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the sum over the batch's pairs, each divided by the number of pairs in the step, and its figures.

        Figures: `rewards_chosen` and `rewards_rejected`, beta times the log-ratio to the reference; `margin`, their
        difference; `accuracy`, the share of pairs with a margin above 0.
        """
        sums, lengths = _sums(policy, batch)
        ratios = sums - _by_half(mx.array(batch.extra["reference"]), batch)
        share = float(batch.extra["share"][0])
        losses = preference_loss(ratios[:, 0], ratios[:, 1], lengths, self._settings)
        rewards = mx.stop_gradient(self._settings.beta * ratios)
        margin = rewards[:, 0] - rewards[:, 1]
        figures = {
            "rewards_chosen": rewards[:, 0],
            "rewards_rejected": rewards[:, 1],
            "margin": margin,
            "accuracy": (margin > 0).astype(mx.float32),
        }
        return losses.sum() * share, {name: value.sum() * share for name, value in figures.items()}

    def evaluate(self, policy: Policy, step: int) -> Evaluation | None:
        """Return loss, rewards, margin and accuracy on the pairs held out."""
        if self._held_out is None or not self._held_out.pairs:
            return None
        totals: dict[str, float] = {}
        for batch in self._batches(policy, self._held_out.pairs):
            loss, figures = self.loss(policy, batch)
            for name, value in {"loss": loss, **figures}.items():
                totals[name] = totals.get(name, 0.0) + float(value.item())
        return Evaluation(totals, -totals["loss"])

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return nothing: a step follows from its number, and the references are on disk."""
        return {}, {}

    def restore(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take up nothing."""

    def _pair(self, at: int) -> Pair:
        """Return the pair at a place in all epochs, one after the other."""
        epoch, within = divmod(at, len(self._pairs.pairs))
        if self._order is None or self._order[0] != epoch:
            drawn = np.random.default_rng([self._arrangement.seed, epoch]).permutation(len(self._pairs.pairs))
            self._order = (epoch, drawn)
        return self._pairs.pairs[int(self._order[1][within])]

    def _batches(self, policy: Policy, pairs: list[Pair]) -> list[Batch]:
        self._learn_references(policy, [pair for pair in pairs if self._reference(pair) is None])
        known = [self._known[pair.digest] for pair in pairs]
        return pack(
            pairs, known, self._arrangement.length, self._arrangement.rows, pad=self._pad, packed=_packs(policy)
        )

    def _reference(self, pair: Pair) -> tuple[float, float] | None:
        digest = pair.digest
        if digest not in self._known:
            if self._references is None and self._path is not None:
                self._references = Store(self._path)
            kept = self._references.get(self._key(digest)) if self._references else None
            if kept is None:
                return None
            self._known[digest] = struct.unpack("<2f", kept)
        return self._known[digest]

    def _learn_references(self, policy: Policy, pairs: list[Pair]) -> None:
        # A pair with a row of its own: then it does not matter which pairs it came with.
        for pair in pairs:
            (batch,) = pack([pair], [(0.0, 0.0)], pair.tokens, 2, pad=self._pad, packed=_packs(policy))
            with policy.reference():
                sums, _ = _sums(policy, batch)
                mx.eval(sums)
            chosen, rejected = np.array(sums).flatten().tolist()
            value = struct.pack("<2f", chosen, rejected)
            if self._references is not None:
                value = self._references.add(self._key(pair.digest), value)
            self._known[pair.digest] = struct.unpack("<2f", value)

    def _key(self, digest: str) -> str:
        return key_of("reference", self._identity, digest)


def _sums(policy: Policy, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the log-probabilities and lengths of both halves of each pair, each f32 [pairs, 2]."""
    return _by_half(policy.logprobs(batch), batch), _by_half(mx.array(batch.weights), batch)


def _by_half(values: mx.array, batch: Batch) -> mx.array:
    """Sum values [rows, length] over each half: [pairs, 2]. Values of padding are 0, wherever they go."""
    half = batch.extra["half"]
    return mx.zeros((int(half.max()) + 1,)).at[mx.array(half)].add(values).reshape(-1, 2)


def preference_loss(chosen: mx.array, rejected: mx.array, lengths: mx.array, settings: DpoSettings) -> mx.array:
    """Return each pair's loss [pairs] from the log-ratios of its halves [pairs] and their lengths [pairs, 2]."""
    if settings.loss in _BY_LENGTH:
        lengths = mx.maximum(lengths, 1)
        chosen, rejected = chosen / lengths[:, 0], rejected / lengths[:, 1]
    d = chosen - rejected
    if settings.loss == "ipo":
        return (d - 1 / (2 * settings.beta)) ** 2
    right, wrong = _softplus(-settings.beta * d), _softplus(settings.beta * d)
    s = settings.label_smoothing
    if settings.loss == "robust":
        return ((1 - s) * right - s * wrong) / (1 - 2 * s)
    return (1 - s) * right + s * wrong


def _packs(policy: Policy) -> bool:
    """Whether rows may hold several documents, which not every architecture can."""
    return bool(getattr(policy, "packs", True))


def _softplus(x: mx.array) -> mx.array:
    """-log sigma(-x), without overflow."""
    return mx.logaddexp(x, 0.0)
