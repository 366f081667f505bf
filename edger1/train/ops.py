"""The operations that training spends its time in: ours where the kernels are, MLX's otherwise, with the same results.

`mixed` says that products may round their operands to bf16 (sums stay f32). Without the kernels, or without bf16 matrix
tiles in the processor, everything is f32 either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from edger1.kernels import _load


@cache
def extension() -> ModuleType | None:
    """Return the kernels, or None where they are missing or MLX computes on a GPU."""
    found, _ = _load()
    return found if found is not None and mx.default_device().type == mx.cpu else None


def multiplies_bf16() -> bool:
    """Whether `mixed` makes a difference here: the kernels are there and the processor multiplies in bf16."""
    found = extension()
    return found is not None and found.active_instruction_set() in ("avx512bf16", "amx")


@dataclass(frozen=True)
class Turning:
    """How positions rotate: by which base, and whether pairs of dimensions are neighbours or halves of a head."""

    base: float
    interleaved: bool


class Ops:
    """The operations in one precision."""

    def __init__(self, mixed: bool) -> None:
        self.kernels = extension()
        self.mixed = mixed and multiplies_bf16()
        self._linear = _linear(self.kernels, self.mixed)
        self._attention: dict[tuple[float, Turning], Callable[..., mx.array]] = {}
        self._add_norm: dict[float, Callable[..., mx.array]] = {}
        self._experts = _experts(self.kernels, self.mixed)
        self._cross_entropy = _cross_entropy(self.kernels, self.mixed)

    def linear(self, x: mx.array, weight: mx.array) -> mx.array:
        """Return x [..., K] times the transpose of weight [N, K]."""
        return self._linear(x, weight)

    def orthogonal(self, matrices: list[mx.array]) -> list[mx.array]:
        """Bring the singular values of matrices [..., M, N] near one, as Muon does; has no gradient."""
        if self.kernels is not None and matrices:
            return list(self.kernels.orthogonal(matrices, self.mixed))
        return [_plain_orthogonal(one) for one in matrices]

    def blend(self, x: mx.array, a: float, y: mx.array, b: float) -> mx.array:
        """Return a x + b y of two arrays of one shape; has no gradient."""
        return self.kernels.blend(x, a, y, b) if self.kernels is not None else a * x + b * y

    def add_norm(self, x: mx.array, y: mx.array, norm: nn.RMSNorm) -> tuple[mx.array, mx.array]:
        """Return x + y and its norm, all [..., D]."""
        if self.kernels is None:
            total = x + y
            return total, norm(total)
        if norm.eps not in self._add_norm:
            self._add_norm[norm.eps] = _add_norm(self.kernels, norm.eps)
        total, normed = self._add_norm[norm.eps](x, y, norm.weight)
        return total, normed

    def attention(
        self, q: mx.array, kv: mx.array, rope: mx.array, starts: mx.array, scale: float, turning: Turning
    ) -> mx.array:
        """Return causal attention within documents, [B, L, H, V].

        q is [B, L, H, N + R] and kv [B, L, H / G, N + V]; R dimensions are rotated by their positions, and those of
        keys are apart: rope [B, L, 1 or H / G, R]. Position i sees positions starts[b, i] .. i, starts being
        int32 [B, L].
        """
        if self.kernels is None:
            return _plain_attention(q, kv, rope, starts, scale, turning)
        kind = (scale, turning)
        if kind not in self._attention:
            self._attention[kind] = _kernel_attention(self.kernels, scale, turning, self.mixed)
        return self._attention[kind](q, kv, rope, starts)

    def best(self, scores: mx.array, count: int) -> mx.array:
        """Return the indices uint32 [..., count] of the highest scores [..., E]; has no gradient."""
        scores = mx.stop_gradient(scores)
        if self.kernels is not None:
            return self.kernels.best_experts(scores, count)
        return mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count]

    def experts(self, x: mx.array, indices: mx.array, shares: mx.array, weights: list[mx.array]) -> mx.array:
        """Return the weighted sum of each token's experts, [T, D].

        x is [T, D], indices uint32 [T, k], shares [T, k]; weights are gate and up [E, M, D], down [E, D, M], and
        perhaps those of an expert for every token, [S, D], [S, D] and [D, S]. Results are summed in the order of
        experts, however the work is split.
        """
        return self._experts(x, indices, shares, *weights)

    def cross_entropy(self, x: mx.array, head: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """Return the weighted sum of all positions' cross entropy in nats, without holding all logits.

        x is [T, D], head [V, D], targets int32 [T], weights [T]; positions of weight 0 cost nothing.
        """
        return self._cross_entropy(x, head, targets, weights)


def _linear(kernels: ModuleType | None, mixed: bool) -> Callable[[mx.array, mx.array], mx.array]:
    if kernels is None or not mixed:
        return lambda x, weight: x @ weight.T

    @mx.custom_function
    def linear(x: mx.array, weight: mx.array) -> mx.array:
        return kernels.mixed_matmul(x, weight.T)

    @linear.vjp
    def linear_vjp(primals: list[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, mx.array]:
        x, weight = primals
        rows, d = x.reshape(-1, x.shape[-1]), cotangent.reshape(-1, weight.shape[0])
        return kernels.mixed_matmul(cotangent, weight), kernels.mixed_matmul(d.T, rows)

    return cast(Callable[..., mx.array], linear)


# Quintic of Newton-Schulz and its number of steps, from Jordan's Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def _plain_orthogonal(matrices: mx.array) -> mx.array:
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.swapaxes(-1, -2) if tall else matrices
    x = x / (mx.sqrt((x * x).sum(axis=(-2, -1), keepdims=True)) + 1e-7)
    for _ in range(_STEPS):
        a = x @ x.swapaxes(-1, -2)
        x = _A * x + (_B * a + _C * (a @ a)) @ x
    return x.swapaxes(-1, -2) if tall else x


def _add_norm(kernels: ModuleType, eps: float) -> Callable[..., mx.array]:
    @mx.custom_function
    def add_norm(x: mx.array, y: mx.array, weight: mx.array) -> list[mx.array]:
        return kernels.add_norm(x, y, weight, eps)

    @add_norm.vjp
    def add_norm_vjp(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, ...]:
        dx, d_weight = kernels.add_norm_vjp(outputs[0], primals[2], *cotangents, eps)
        return dx, dx, d_weight

    return cast(Callable[..., mx.array], add_norm)


def _plain_attention(
    q: mx.array, kv: mx.array, rope: mx.array, starts: mx.array, scale: float, turning: Turning
) -> mx.array:
    rotated = rope.shape[-1]
    plain = q.shape[-1] - rotated

    def turn(a: mx.array) -> mx.array:
        # From the row's start and not the document's, which attention cannot tell apart.
        out = mx.fast.rope(
            a.swapaxes(1, 2), rotated, traditional=turning.interleaved, base=turning.base, scale=1.0, offset=0
        )
        return out.swapaxes(1, 2)

    q = mx.concatenate([q[..., :plain], turn(q[..., plain:])], axis=-1)
    keys = mx.broadcast_to(turn(rope), (*kv.shape[:-1], rotated))
    k, v = mx.concatenate([kv[..., :plain], keys], axis=-1), kv[..., plain:]
    at = mx.arange(q.shape[1])
    mask = (at[None, None, :] <= at[None, :, None]) & (at[None, None, :] >= starts[:, :, None])
    out = mx.fast.scaled_dot_product_attention(
        q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), scale=scale, mask=mask[:, None]
    )
    return out.swapaxes(1, 2)


def _kernel_attention(kernels: ModuleType, scale: float, turning: Turning, mixed: bool) -> Callable[..., mx.array]:
    kind = (scale, turning.base, turning.interleaved, mixed)

    @mx.custom_function
    def attention(q: mx.array, kv: mx.array, rope: mx.array, starts: mx.array) -> mx.array:
        return kernels.document_attention(q, kv, rope, starts, *kind)

    @attention.vjp
    def attention_vjp(primals: list[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        grads = kernels.document_attention_vjp(*primals, cotangent, *kind)
        return (*grads, mx.zeros_like(primals[3]))

    return cast(Callable[..., mx.array], attention)


def _plain_experts(x: mx.array, indices: mx.array, shares: mx.array, *weights: mx.array) -> mx.array:
    gate, up, down, *shared = weights
    per_token = indices.shape[-1]
    flat = indices.flatten()
    order = mx.argsort(flat)
    rows = mx.expand_dims(x[order // per_token], -2)
    which = flat[order]

    def product(a: mx.array, w: mx.array) -> mx.array:
        return mx.gather_mm(a, w.swapaxes(-1, -2), rhs_indices=which, sorted_indices=True)

    g = product(rows, gate)
    y = product(g * mx.sigmoid(g) * product(rows, up), down)
    y = mx.unflatten(y.squeeze(-2)[mx.argsort(order)], 0, indices.shape)
    out = (y * shares[..., None]).sum(axis=-2)
    if shared:
        g = x @ shared[0].T
        out = out + (g * mx.sigmoid(g) * (x @ shared[1].T)) @ shared[2].T
    return out


def _experts(kernels: ModuleType | None, mixed: bool) -> Callable[..., mx.array]:
    if kernels is None:
        return _plain_experts

    @mx.custom_function
    def experts(x: mx.array, indices: mx.array, shares: mx.array, *weights: mx.array) -> mx.array:
        return kernels.experts(x, indices, shares, weights, mixed)

    @experts.vjp
    def experts_vjp(primals: list[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, indices, shares, *weights = primals
        dx, d_shares, *d_weights = kernels.experts_vjp(x, indices, shares, weights, cotangent, mixed)
        return dx, mx.zeros_like(indices), d_shares, *d_weights

    return cast(Callable[..., mx.array], experts)


def _plain_cross_entropy(x: mx.array, head: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    logits = x @ head.T
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return ((mx.logsumexp(logits, axis=-1) - picked) * weights).sum()


def _cross_entropy(kernels: ModuleType | None, mixed: bool) -> Callable[..., mx.array]:
    if kernels is None:
        return _plain_cross_entropy

    # The gradients fall out of the pass that computes the loss; they wait here for the factor that is their due.
    @mx.custom_function
    def with_gradients(x: mx.array, head: mx.array, targets: mx.array, weights: mx.array) -> list[mx.array]:
        return kernels.cross_entropy(x, head, targets, weights, mixed)

    @with_gradients.vjp
    def with_gradients_vjp(
        primals: list[mx.array], cotangents: list[mx.array], outputs: list[mx.array]
    ) -> tuple[mx.array, ...]:
        factor = cotangents[0]
        return outputs[1] * factor, outputs[2] * factor, mx.zeros_like(primals[2]), mx.zeros_like(primals[3])

    function = cast(Callable[..., list[mx.array]], with_gradients)
    return lambda x, head, targets, weights: function(x, head, targets, weights)[0]
