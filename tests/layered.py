"""A small causal model in NumPy that can be run layer by layer, for tests of what measures such models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edger1.quant.layers import Pass, Watch


class Layered:
    """A causal model of random weights. Each layer adds a function of the running mean of all positions so far.

    `noise` is added to all weights, so that a model of the same seed with noise is as one that was quantized.
    """

    def __init__(
        self,
        name: str = "source",
        *,
        seed: int = 0,
        noise: float = 0.0,
        layers: int = 3,
        hidden: int = 16,
        vocabulary: int = 40,
        shift: int = 0,
    ) -> None:
        random, spoilt = np.random.default_rng(seed), np.random.default_rng(seed + 1)

        def weights(*shape: int) -> Any:
            exact = random.normal(size=shape) / np.sqrt(shape[-1])
            return (exact + noise * spoilt.normal(size=shape)).astype(np.float32)

        self.name = name
        self.config: dict[str, Any] = {}
        self.embedding = weights(vocabulary, hidden) * 4
        self.matrices = [weights(hidden, hidden) for _ in range(layers)]
        self.head = weights(vocabulary, hidden) * 8
        self.heads_rows: list[int] = []
        """Positions of each call of `logits`."""
        self.longest = 0
        """Most tokens in a call of `advance`."""
        self._shift = shift

    @property
    def layers(self) -> int:
        return len(self.matrices)

    def encode(self, text: str) -> list[int]:
        return [(ord(c) + self._shift) % len(self.embedding) for c in text]

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        raise NotImplementedError

    def begin(self, tokens: np.ndarray) -> Any:
        return Pass(tokens, self.embedding[tokens])  # type: ignore[arg-type]

    def layer(self, layer: int, hidden: np.ndarray) -> np.ndarray:
        count = np.arange(1, hidden.shape[1] + 1, dtype=np.float32)[None, :, None]
        mean = np.cumsum(hidden, axis=1) / count
        return hidden + np.tanh((hidden + mean) @ self.matrices[layer].T)

    def advance(self, layer: int, passes: Sequence[Any], watch: Watch | None = None) -> None:
        self.longest = max(self.longest, sum(passing.tokens.size for passing in passes))
        for passing in passes:
            passing.hidden = self.layer(layer, passing.hidden)

    def logits(self, passing: Any, watch: Watch | None = None) -> Any:
        self.heads_rows.append(passing.tokens.size)
        return passing.hidden @ self.head.T

    def close(self) -> None:
        pass

    def whole(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits of all positions of one window, [tokens, vocabulary]."""
        hidden = self.embedding[list(tokens)][None]
        for layer in range(self.layers):
            hidden = self.layer(layer, hidden)
        return np.asarray(hidden[0] @ self.head.T)
