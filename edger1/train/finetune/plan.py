"""What a run will need: memory by a model of it, time by a short measurement; and how many rows memory allows."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from edger1.errors import MemoryCeilingError
from edger1.memory import PROCESS_BYTES, default_ceiling, machine_bytes
from edger1.train.finetune.logprobs import LOGIT_BYTES
from edger1.train.finetune.method import Batch
from edger1.train.finetune.policy import LocalPolicy
from edger1.units import format_bytes, parse_size

_AT_ONCE = 3
"""Arrays of a layer's activations that exist together backwards: what it computes, its gradient, what comes between."""
_LOGITS_AT_ONCE = 4
_MEASURED_WORK = 2e11
"""Multiplications of weights that a measurement of the rate may cost."""


@dataclass(frozen=True)
class Anatomy:
    """What of a model decides the memory of training it."""

    weight_bytes: int
    adapter_bytes: int
    layers: int
    hidden: int
    layer_width: int
    """Numbers that a layer computes for a token."""
    head: bool
    """Whether logits exist a chunk at a time only."""
    vocabulary: int
    checkpointing: bool


def anatomy(policy: LocalPolicy) -> Anatomy:
    """Describe a policy's model."""
    layers = policy.model.layers
    hidden = policy.hidden_size
    widest = max(_width(layer, hidden) for layer in layers)
    weights = sum(v.nbytes for _, v in tree_flatten(policy.model.parameters()))
    adapter = sum(w.nbytes for w in policy.parameters().values())
    return Anatomy(
        weights - adapter, adapter, len(layers), hidden, widest, policy.structure is not None, policy.vocabulary,
        policy.layered,
    )  # fmt: skip


def _width(layer: Any, hidden: int) -> int:
    """Numbers that a layer computes for a token: each matrix's outputs, and a few rows of the hidden size."""
    width = 8 * hidden
    chosen = next((m.top_k for m in layer.modules() if isinstance(getattr(m, "top_k", None), int)), 1)
    for module in layer.modules():
        weight = module.get("weight") if isinstance(module, dict) else None
        if weight is not None and weight.ndim >= 2:
            width += 2 * weight.shape[-2] * (chosen if weight.ndim == 3 else 1)
    return width


@dataclass(frozen=True)
class Memory:
    """Bytes that a step needs, in parts."""

    weights: int
    adapter: int
    """The adapter, its gradients and the optimizer's state."""
    activations: int
    process: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.adapter + self.activations + self.process

    def __str__(self) -> str:
        return (
            f"{format_bytes(self.total)}: weights {format_bytes(self.weights)}, adapter and optimizer "
            f"{format_bytes(self.adapter)}, activations {format_bytes(self.activations)}, process "
            f"{format_bytes(self.process)}"
        )


def memory(found: Anatomy, rows: int, length: int) -> Memory:
    """Return what a batch of rows of a length needs."""
    tokens = rows * length
    held = found.layers if not found.checkpointing else 1
    between = tokens * found.hidden * (found.layers + 6 if found.checkpointing else 6)
    logits = LOGIT_BYTES if found.head else 4 * tokens * found.vocabulary
    activations = 4 * (between + _AT_ONCE * held * tokens * found.layer_width) + _LOGITS_AT_ONCE * logits
    # Weights, both moments, a batch's gradients and their sum.
    return Memory(found.weight_bytes, 5 * found.adapter_bytes, activations, PROCESS_BYTES)


def ceiling(text: str) -> int:
    """Return the bytes that `memory` of the settings allows."""
    return parse_size(text, whole=machine_bytes()) if text else default_ceiling()


def choose_rows(found: Anatomy, length: int, wanted: int, ceiling_bytes: int) -> int:
    """Return how many rows of a length pass together: as many as are wanted, or fewer for memory's sake.

    Raises MemoryCeilingError where not even one fits.
    """
    for rows in range(max(1, wanted), 0, -1):
        if memory(found, rows, length).total <= ceiling_bytes:
            return rows
    needed = memory(found, 1, length)
    raise MemoryCeilingError(
        f"Training on rows of {length:,} tokens needs {needed}; the ceiling is {format_bytes(ceiling_bytes)}. "
        "Give more --memory, or shorter rows by --length."
    )


def check(found: Anatomy, rows: int, length: int, ceiling_bytes: int) -> None:
    """Raise MemoryCeilingError where rows that somebody asked for do not fit."""
    needed = memory(found, rows, length)
    if needed.total > ceiling_bytes:
        raise MemoryCeilingError(
            f"Training on {rows} rows of {length:,} tokens needs {needed}; the ceiling is "
            f"{format_bytes(ceiling_bytes)}. Give fewer rows, shorter ones by --length, or more --memory."
        )


@dataclass(frozen=True)
class Plan:
    """A run before it begins."""

    steps: int
    accumulate: int
    rows: int
    length: int
    memory: Memory
    ceiling_bytes: int
    tokens_per_s: float
    """Of positions through the model, forwards and backwards, as measured."""

    @property
    def positions(self) -> int:
        """Positions that pass the model, padding among them."""
        return self.steps * self.accumulate * self.rows * self.length

    @property
    def seconds(self) -> float:
        """How long the steps take, evaluations not counted."""
        return self.positions / self.tokens_per_s

    def lines(self) -> list[str]:
        """Return the plan for a reader."""
        each = self.accumulate * self.rows * self.length
        batches = f"{self.accumulate} x " if self.accumulate > 1 else ""
        return [
            f"{self.steps:,} steps of up to {each:,} tokens ({batches}{self.rows} rows of {self.length:,}), "
            f"{self.positions:,} in all",
            f"memory about {self.memory}; ceiling {format_bytes(self.ceiling_bytes)}",
            f"about {_duration(self.seconds)} at {self.tokens_per_s:,.0f} tokens/s, measured on a few",
        ]


def measure(policy: LocalPolicy, length: int) -> float:
    """Return tokens a second of one pass forwards and backwards over a short row; the adapter stays as it is."""
    share = max(1, policy.folder.parameters)
    count = int(min(length, max(16, min(256, _MEASURED_WORK / share))))
    ids = (np.arange(count, dtype=np.int32) * 7919 % max(2, policy.vocabulary))[None]
    weights = np.ones((1, count), np.float32) / count
    weights[:, 0] = 0
    batch = Batch(ids, np.zeros((1, count), np.int32), weights)

    def loss() -> tuple[mx.array, dict[str, mx.array]]:
        return -(policy.logprobs(batch) * mx.array(batch.weights)).sum(), {}

    policy.value_and_grad(loss)
    began = time.perf_counter()
    policy.value_and_grad(loss)
    return count / (time.perf_counter() - began)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
