"""A policy small enough to be computed again in NumPy: a token's logits follow from the token before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.train.finetune.method import Batch


class ToyPolicy:
    """Logits of the next token are row `base[t] + adapter[t]` of a table [vocabulary, vocabulary]."""

    tokenizer: Any = None

    def __init__(self, vocabulary: int = 11, seed: int = 0, *, packs: bool = True) -> None:
        drawn = np.random.default_rng(seed)
        self.base = drawn.normal(size=(vocabulary, vocabulary)).astype(np.float32)
        self.adapter = mx.array(drawn.normal(size=(vocabulary, vocabulary)).astype(np.float32) * 0.5)
        self.packs = packs
        self.on = True
        self.passes = 0

    def _logits(self, batch: Batch) -> mx.array:
        self.passes += 1
        if not self.packs:
            assert batch.documents.max() == 0
        assert (batch.weights[batch.documents < 0] == 0).all()
        table = mx.array(self.base) + (self.adapter if self.on else 0)
        before = np.concatenate([batch.ids[:, :1], batch.ids[:, :-1]], axis=1)
        return table[mx.array(before)]

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> mx.array:
        logits = self._logits(batch) / temperature
        picked = mx.take_along_axis(logits, mx.array(batch.ids)[..., None], axis=-1)[..., 0]
        return mx.where(mx.array(batch.weights) != 0, picked - mx.logsumexp(logits, axis=-1), 0.0)

    def logits(self, batch: Batch) -> mx.array:
        logits = self._logits(batch)
        return logits.reshape(-1, logits.shape[-1])[mx.array(np.flatnonzero(batch.weights))]

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.on = False
        try:
            yield
        finally:
            self.on = True

    @contextmanager
    def generation(self) -> Iterator[Any]:
        yield None

    def gradient(self, loss: Callable[[], tuple[mx.array, dict[str, mx.array]]]) -> tuple[float, np.ndarray]:
        """Return a loss and its gradient in the adapter."""
        kept = self.adapter

        def of(adapter: mx.array) -> mx.array:
            self.adapter = adapter
            return loss()[0]

        try:
            value, slope = mx.value_and_grad(of)(kept)
            return float(value.item()), np.array(slope)
        finally:
            self.adapter = kept


def numeric_gradient(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Return central differences of a function of f64 values."""
    slope = np.zeros_like(at)
    for place in np.ndindex(at.shape):
        moved = at.copy()
        moved[place] += step
        above = function(moved)
        moved[place] -= 2 * step
        slope[place] = (above - function(moved)) / (2 * step)
    return slope
