"""A model one decoder layer at a time: what calibration and measuring need of an engine, and all they need.

A pass takes windows of tokens through the model layer by layer, every window through a layer before the next layer is
read, so that each layer's weights are read once and only one layer's are in memory:

    passing = source.begin(tokens)             # one Pass for each batch of windows
    for layer in range(source.layers):
        source.advance(layer, passes, watch)   # each Pass's `hidden` is what the layer gave
    source.logits(passing)

Two models are compared in step: both advance through a layer, then their `hidden` is compared. Assigning one's `hidden`
to the other's pass before a layer gives that layer's own error alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

Watch = Callable[[str, int | None, np.ndarray], None]
"""Hears of the inputs of every linear: (path, expert, inputs).

`path` is the module's in mlx-lm's model ("model.layers.0.self_attn.q_proj"), `expert` the row of a stacked linear and
None for a plain one, `inputs` is f32 [rows, columns] and valid during the call only."""

Change = Callable[[str, int | None, int, np.ndarray], np.ndarray | None]
"""Changes a matrix on trial: (path, expert, start, rows) -> what to compute with instead of f32 rows [start, ...), or
None where they stay as they are."""


@dataclass
class Pass:
    """Windows of tokens on their way through a model.

    `tokens` is int32 [windows, length]; `hidden` is the hidden state f32 [windows, length, hidden size], before the
    first layer that of the embedding. `own` is the source's, and nobody else's.
    """

    tokens: np.ndarray
    hidden: np.ndarray
    own: Any = field(default=None, repr=False)


class LayerSource(Protocol):
    """A model that can be run layer by layer. All methods run on the thread that owns MLX."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def config(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        ...

    def linears(self, layer: int | None) -> dict[str, tuple[int, ...]]:
        """Return the linears in a decoder layer, outside of all layers for None, by path.

        The shapes are [rows, columns], of a stack [experts, rows, columns].
        """
        ...

    def rows(self, path: str, expert: int | None, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a linear's matrix as f32."""
        ...

    def encode(self, text: str) -> list[int]:
        """Return the text's token ids, without special tokens before or after."""
        ...

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the token ids of a whole chat, by the model's template.

        Raises FormatError where the model has no template.
        """
        ...

    def begin(self, tokens: np.ndarray, change: Change | None = None) -> Pass:
        """Embed int [windows, length] tokens."""
        ...

    def advance(
        self, layer: int, passes: Sequence[Pass], watch: Watch | None = None, change: Change | None = None
    ) -> None:
        """Take each pass through decoder layer `layer`; `hidden` becomes the layer's output."""
        ...

    def logits(self, passing: Pass, watch: Watch | None = None, change: Change | None = None) -> np.ndarray:
        """Return f32 [windows, length, vocabulary] after the last layer."""
        ...

    def close(self) -> None:
        """Give the memory back and close the files."""
        ...
