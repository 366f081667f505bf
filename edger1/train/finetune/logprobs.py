"""Log-probabilities of tokens from hidden states, a few rows at a time, so that a batch's logits never exist.

What a token's log-probability changes with is its own hidden state alone. So the pass that computes the
log-probabilities leaves their gradients as well, [N, D] and no more; going backwards is a product with the cotangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx
import numpy as np

Head = Callable[[mx.array], mx.array]
"""Hidden states [N, D] -> logits [N, V]."""

LOGIT_BYTES = 32 << 20
"""Of one chunk of logits in f32; a few arrays of this size exist at a time."""


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of logits are computed together."""
    return max(16, LOGIT_BYTES // (4 * vocabulary))


def picked(head: Head, hidden: mx.array, targets: mx.array, temperature: float, rows: int) -> mx.array:
    """Return f32 [N]: natural log-probabilities of targets int32 [N] by the states hidden [N, D]; has no gradient.

    Logits are divided by `temperature`; `rows` of them exist at a time.
    """
    found = []
    for first in range(0, hidden.shape[0], rows):
        found.append(_picked(head, hidden[first : first + rows], targets[first : first + rows], temperature))
        mx.eval(found[-1])
    return mx.concatenate(found) if found else mx.zeros((0,))


def differentiable(head: Head, hidden: mx.array, targets: mx.array, temperature: float, rows: int) -> mx.array:
    """Return what `picked` does, with a gradient for `hidden`; the head must hold nothing that is trained."""

    @mx.custom_function
    def with_gradients(hidden: mx.array, targets: mx.array) -> list[mx.array]:
        states = concrete(hidden)
        found, slopes = [], []
        for first in range(0, states.shape[0], rows):
            some, goals = states[first : first + rows], targets[first : first + rows]
            outputs, gradients = mx.vjp(
                lambda h, goals=goals: _picked(head, h, goals, temperature), [some], [mx.ones(some.shape[:1])]
            )
            # What MLX is differentiating holds on to all that these were computed from.
            found.append(concrete(outputs[0]))
            slopes.append(concrete(gradients[0]))
        return [mx.concatenate(found), mx.concatenate(slopes)]

    @with_gradients.vjp
    def with_gradients_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> Any:
        slopes = outputs[1]
        return cotangents[0].astype(slopes.dtype)[:, None] * slopes, mx.zeros_like(primals[1])

    if not hidden.shape[0]:
        return hidden.sum(axis=-1).astype(mx.float32)
    return cast(Callable[..., list[mx.array]], with_gradients)(hidden, targets)[0]


def _picked(head: Head, hidden: mx.array, targets: mx.array, temperature: float) -> mx.array:
    return of_logits(head(hidden), targets, temperature)


@mx.custom_function
def _of_logits(logits: mx.array, targets: mx.array) -> list[mx.array]:
    normal = mx.logsumexp(logits, axis=-1)
    chosen = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return [chosen - normal, normal]


@_of_logits.vjp
def _of_logits_vjp(primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]) -> Any:
    # 1 at the target minus the distribution; written out, it takes one array of the logits' size.
    logits, targets = primals
    slopes = cotangents[0]
    spread = mx.exp(logits - outputs[1][..., None]) * -slopes[..., None]
    rows = mx.arange(spread.shape[0])
    return spread.at[rows, targets].add(slopes), mx.zeros_like(targets)


def of_logits(logits: mx.array, targets: mx.array, temperature: float) -> mx.array:
    """Return f32 [N]: natural log-probabilities of targets [N] by logits [N, V] divided by `temperature`."""
    logits = logits.astype(mx.float32)
    if temperature != 1.0:
        logits = logits * (1.0 / temperature)
    return cast(Callable[..., list[mx.array]], _of_logits)(logits, targets)[0]


def concrete(x: mx.array) -> mx.array:
    """Return a copy of an array that differentiation does not follow: what is computed from it is not kept."""
    mx.eval(x)
    if x.dtype == mx.bfloat16:
        return mx.array(np.array(x.view(mx.uint16), copy=False)).view(mx.bfloat16)
    return mx.array(np.array(x, copy=False))
