"""The operations that training spends its time in: ours where the kernels are, MLX's otherwise, with the same results.

`mixed` says that products may round their operands to bf16 (sums stay f32). Without the kernels, or without bf16 matrix
tiles in the processor, everything is f32 either way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx

from edger1.kernels import _load


@cache
def extension() -> ModuleType | None:
    """Return the kernels, or None where they are missing or MLX computes on a GPU."""
    found, _ = _load()
    return found if found is not None and mx.default_device().type == mx.cpu else None


def has_tiles() -> bool:
    """Whether `mixed` makes a difference here: the kernels are there and the processor has bf16 matrix tiles."""
    found = extension()
    return found is not None and found.active_instruction_set() == "amx"


class Ops:
    """The operations in one precision."""

    def __init__(self, mixed: bool) -> None:
        self.kernels = extension()
        self.mixed = mixed and has_tiles()
        self._linear = _linear(self.kernels, self.mixed)
        self._attention: dict[float, Callable[..., mx.array]] = {}
        self._experts = _experts(self.kernels, self.mixed)
        self._cross_entropy = _cross_entropy(self.kernels, self.mixed)

    def linear(self, x: mx.array, weight: mx.array) -> mx.array:
        """Return x [..., K] times the transpose of weight [N, K]."""
        return self._linear(x, weight)

    def matmul(self, a: mx.array, b: mx.array) -> mx.array:
        """Return a [..., M, K] times b [..., K, N]; has no gradient."""
        return self.kernels.mixed_matmul(a, b) if self.kernels is not None and self.mixed else a @ b

    def attention(self, q: mx.array, k: mx.array, v: mx.array, starts: mx.array, scale: float) -> mx.array:
        """Return causal attention within documents, [B, L, H, V].

        q is [B, L, H, D], k [B, L, H / G, D], v [B, L, H / G, V]; position i sees positions starts[b, i] .. i, starts
        being int32 [B, L].
        """
        if self.kernels is None:
            return _plain_attention(q, k, v, starts, scale)
        if scale not in self._attention:
            self._attention[scale] = _kernel_attention(self.kernels, scale, self.mixed)
        return self._attention[scale](q, k, v, starts)

    def experts(
        self, x: mx.array, indices: mx.array, shares: mx.array, gate: mx.array, up: mx.array, down: mx.array
    ) -> mx.array:
        """Return the weighted sum of each token's experts, [T, D].

        x is [T, D], indices uint32 [T, k], shares [T, k], gate and up [E, M, D], down [E, D, M]. The experts' results
        are summed in rank order, and their gradients by token order, however the work is split.
        """
        return self._experts(x, indices, shares, gate, up, down)

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

    return linear


def _plain_attention(q: mx.array, k: mx.array, v: mx.array, starts: mx.array, scale: float) -> mx.array:
    at = mx.arange(q.shape[1])
    mask = (at[None, None, :] <= at[None, :, None]) & (at[None, None, :] >= starts[:, :, None])
    out = mx.fast.scaled_dot_product_attention(
        q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2), scale=scale, mask=mask[:, None]
    )
    return out.swapaxes(1, 2)


def _kernel_attention(kernels: ModuleType, scale: float, mixed: bool) -> Callable[..., mx.array]:
    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array, starts: mx.array) -> mx.array:
        return kernels.document_attention(q, k, v, starts, scale, mixed)

    @attention.vjp
    def attention_vjp(primals: list[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        q, k, v, starts = primals
        grads = kernels.document_attention_vjp(q, k, v, starts, cotangent, scale, mixed)
        return (*grads, mx.zeros_like(starts))

    return attention


def _plain_experts(
    x: mx.array, indices: mx.array, shares: mx.array, gate: mx.array, up: mx.array, down: mx.array
) -> mx.array:
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
    return (y * shares[..., None]).sum(axis=-2)


def _experts(kernels: ModuleType | None, mixed: bool) -> Callable[..., mx.array]:
    if kernels is None:
        return _plain_experts

    @mx.custom_function
    def experts(
        x: mx.array, indices: mx.array, shares: mx.array, gate: mx.array, up: mx.array, down: mx.array
    ) -> mx.array:
        return kernels.experts(x, indices, shares, gate, up, down, mixed)

    @experts.vjp
    def experts_vjp(primals: list[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        x, indices, shares, gate, up, down = primals
        dx, d_shares, d_gate, d_up, d_down = kernels.experts_vjp(x, indices, shares, gate, up, down, cotangent, mixed)
        return dx, mx.zeros_like(indices), d_shares, d_gate, d_up, d_down

    return experts


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

    return lambda x, head, targets, weights: with_gradients(x, head, targets, weights)[0]
