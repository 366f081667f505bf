"""What a way of fine-tuning is to the loop that runs it.

The loop (`run.py`) owns the model with its adapter, the optimizer, the schedule, checkpoints, the log and Ctrl-C. A
method gives it the batches of each optimizer step and their loss, and what it must find again after a stop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from pathlib import Path

    import mlx.core as mx
    import numpy as np


@dataclass(frozen=True)
class Batch:
    """Rows of tokens that pass the model together.

    A row holds one or more documents; attention stays within each.
    """

    ids: np.ndarray
    """int32 [rows, length]."""
    documents: np.ndarray
    """int32 [rows, length]: which document of its row a token belongs to, -1 for padding."""
    weights: np.ndarray
    """f32 [rows, length]: how much predicting ids[:, t] from the tokens before it in its document counts.

    0 for the first token of a document, for prompts and for padding. Divided already by what the step's loss is divided
    by, so that a step's losses and gradients are the sums over its batches.
    """
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    """What a method adds, each [rows] or [rows, length]: advantages, earlier log-probabilities."""


@dataclass(frozen=True)
class Step:
    """The batches of one optimizer step, what else is known of it for the log, and how many tokens count in it."""

    batches: list[Batch]
    tokens: int
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """An answer that the model gave during an evaluation, to be shown and logged."""

    prompt: str
    text: str
    rewards: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Figures on held-out data; `better` is what early stopping watches, and is better when higher."""

    figures: dict[str, float]
    better: float
    samples: list[Sample] = field(default_factory=list)


class Policy(Protocol):
    """A model with its adapter, as a method sees it; `policy.py` is one."""

    tokenizer: Any

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> mx.array:
        """Return f32 [rows, length]: natural log-probability of ids[:, t] given its document's tokens before it.

        Logits are divided by `temperature` first. 0 where `batch.weights` is 0. Differentiable in the adapter.
        """

    def logits(self, batch: Batch) -> mx.array:
        """Return f32 [counted, vocabulary]: the logits that predict tokens with a weight, in order of rows and places.

        For distillation, in batches small enough for memory. Differentiable in the adapter's weights.
        """

    def reference(self) -> AbstractContextManager[None]:
        """Switch the adapter off within: the model that training started from."""

    def generation(self) -> AbstractContextManager[Any]:
        """Ready the model for decoding within, adapter on, and give mlx-lm's model to be called with a cache."""


class Method(Protocol):
    """SFT, GRPO, DPO or distillation."""

    name: str

    def describe(self) -> list[str]:
        """Return the plan's lines about the data and the method."""

    def step(self, policy: Policy, step: int) -> Step:
        """Return the batches of optimizer step `step` (from 0).

        They depend on the seed, the step, the policy and what was restored, and on nothing else.
        """

    def loss(self, policy: Policy, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return a scalar to differentiate, and figures, which are summed over a step's batches."""

    def evaluate(self, policy: Policy, step: int) -> Evaluation | None:
        """Measure on held-out data; None where there is none."""

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return what a resumed run must find again: plain JSON values, and arrays."""

    def restore(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take up what `state` gave."""


@runtime_checkable
class Recording(Protocol):
    """A method that writes files of its own into the run's folder."""

    def log_to(self, run: Path) -> None:
        """Take note of the folder; it is there when the first step is asked for."""
