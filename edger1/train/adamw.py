"""AdamW (arXiv 1711.05101) over a flat table of f32 weights, and the norm that gradients are clipped by."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx

Table = dict[str, mx.array]

EPSILON = 1e-8


@dataclass(frozen=True)
class Rule:
    """What an update goes by: the betas, and `decay`, which is decoupled from the gradient."""

    beta1: float
    beta2: float
    decay: float


def update(
    weight: mx.array,
    gradient: mx.array,
    m: mx.array,
    v: mx.array,
    rule: Rule,
    *,
    step: int,
    rate: float,
    scale: float,
    kernels: ModuleType | None,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return a weight and its two moments after step number `step` (from 1), with the gradient times `scale`.

    The kernels do it in one pass over memory, MLX in a dozen.
    """
    first, second = 1 - rule.beta1**step, 1 - rule.beta2**step
    if kernels is not None and hasattr(kernels, "adamw"):
        found = kernels.adamw(
            weight, gradient, m, v, scale, rate, rule.beta1, rule.beta2, EPSILON, rule.decay, first, second
        )
        return found[0], found[1], found[2]
    gradient = gradient * scale
    m = rule.beta1 * m + (1 - rule.beta1) * gradient
    v = rule.beta2 * v + (1 - rule.beta2) * gradient * gradient
    weight = weight * (1 - rate * rule.decay) - rate * (m / first) / (mx.sqrt(v / second) + EPSILON)
    return weight, m, v


def clipped(norm: float, limit: float) -> float:
    """Return what gradients of a global norm are multiplied with; 0 is no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit else 1.0


def global_norm(gradients: Table, kernels: ModuleType | None = None) -> mx.array:
    """Return the root of the sum of all squares."""
    square = kernels.squared_norm if kernels is not None and hasattr(kernels, "squared_norm") else _squared_norm
    return mx.sqrt(sum((square(g) for g in gradients.values()), mx.array(0.0)))


def _squared_norm(gradient: mx.array) -> mx.array:
    return (gradient * gradient).sum()
