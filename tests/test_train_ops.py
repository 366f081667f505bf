"""The operations of training against the same computed with MLX's own, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from edger1.train import ops

kernels = ops.extension()
pytestmark = pytest.mark.skipif(kernels is None, reason="the kernels are not built")

EXACT, BF16 = 2e-6, 8e-3


def arrays(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> list[mx.array]:
    generator = np.random.default_rng(seed)
    return [mx.array(scale * generator.normal(size=shape).astype(np.float32)) for shape in shapes]


def off(found: mx.array, expected: mx.array) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    a, b = (np.array(x, dtype=np.float64) for x in (found, expected))
    assert a.shape == b.shape
    return float(np.sqrt(((a - b) ** 2).mean() / max(1e-30, (b**2).mean())))


def compare(
    ours: Callable[..., mx.array], plain: Callable[..., mx.array], inputs: list[mx.array], bound: float
) -> None:
    """Hold a function and its gradients by all inputs against another."""
    expected = plain(*inputs)
    assert off(ours(*inputs), expected) < bound
    (cotangent,) = arrays(expected.shape, seed=9)
    numbers = list(range(len(inputs)))
    gradients = [mx.grad(lambda *a, f=f: (f(*a) * cotangent).sum(), argnums=numbers)(*inputs) for f in (ours, plain)]
    for found, wanted in zip(*gradients, strict=True):
        assert off(found, wanted) < bound


def test_products_of_single_rows_that_lie_apart() -> None:
    y, z, b = arrays((64, 128), (1, 96), (64, 48))
    cases = [
        (y[:, None, ::2], b),
        (arrays((64, 1), seed=3)[0], z[:, ::2]),
        (arrays((4, 8, 1), seed=4)[0], mx.broadcast_to(z, (4, 1, 96))[:, :, ::2]),
        (mx.broadcast_to(mx.array(1.5), (8, 1, 64)), b),
        (arrays((64, 1), seed=5)[0], mx.broadcast_to(mx.array(1.5), (1, 64))),
        (y[:, ::2], mx.broadcast_to(mx.array(1.5), (64, 48))),
    ]
    for left, right in cases:
        assert off(kernels.mixed_matmul(left, right), left @ right) < BF16


@pytest.mark.parametrize(("mixed", "bound"), [(False, EXACT), (True, BF16)])
@pytest.mark.parametrize("shared", [True, False])
def test_experts(mixed: bool, bound: float, shared: bool) -> None:
    tokens, dim, experts, inner, chosen = 300, 40, 6, 24, 2
    generator = np.random.default_rng(1)
    # Expert 4 gets nothing, and its gradient is zero.
    picks = np.stack([generator.permutation([0, 1, 2, 3, 5])[:chosen] for _ in range(tokens)])
    indices = mx.array(picks.astype(np.uint32))
    weights = arrays((experts, inner, dim), (experts, inner, dim), (experts, dim, inner), scale=0.2)
    if shared:
        weights += arrays((36, dim), (36, dim), (dim, 36), seed=4, scale=0.2)
    x, shares = arrays((tokens, dim), (tokens, chosen), seed=2)
    made = ops.Ops(mixed)
    compare(
        lambda x, shares, *w: made.experts(x, indices, shares, list(w)),
        lambda x, shares, *w: ops._plain_experts(x, indices, shares, *w),
        [x, shares, *weights],
        bound,
    )


@pytest.mark.parametrize(("mixed", "bound"), [(False, EXACT), (True, BF16)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rope_heads", "plain", "rotated", "value", "interleaved"),
    [(4, 4, 1, 16, 8, 16, True), (4, 2, 2, 0, 32, 24, False)],
)
def test_attention_stays_within_documents(
    mixed: bool,
    bound: float,
    heads: int,
    kv_heads: int,
    rope_heads: int,
    plain: int,
    rotated: int,
    value: int,
    interleaved: bool,
) -> None:
    q, kv, rope = arrays(
        (2, 150, heads, plain + rotated), (2, 150, kv_heads, plain + value), (2, 150, rope_heads, rotated)
    )
    starts = np.zeros((2, 150), np.int32)
    starts[0, 30:], starts[0, 31:], starts[1, 80:] = 30, 31, 80
    where, turning = mx.array(starts), ops.Turning(10000.0, interleaved)
    made = ops.Ops(mixed)
    compare(
        lambda *a: made.attention(*a, where, 0.2, turning),
        lambda *a: ops._plain_attention(*a, where, 0.2, turning),
        [q, kv, rope],
        bound,
    )


@pytest.mark.parametrize(("mixed", "bound"), [(False, EXACT), (True, BF16)])
def test_cross_entropy_counts_weighted_positions_only(mixed: bool, bound: float) -> None:
    x, head = arrays((130, 24), (70, 24))
    generator = np.random.default_rng(3)
    targets = mx.array(generator.integers(0, 70, 130).astype(np.int32))
    weights = mx.array((generator.random(130) < 0.7).astype(np.float32))
    made = ops.Ops(mixed)
    compare(
        lambda x, head: made.cross_entropy(x, head, targets, weights),
        lambda x, head: ops._plain_cross_entropy(x, head, targets, weights),
        [x, head],
        bound,
    )


@pytest.mark.parametrize(("mixed", "bound"), [(False, EXACT), (True, BF16)])
def test_linear(mixed: bool, bound: float) -> None:
    x, weight = arrays((3, 70, 50), (33, 50))
    compare(ops.Ops(mixed).linear, lambda x, w: x @ w.T, [x, weight], bound)


def test_a_residual_and_its_norm() -> None:
    import mlx.nn as nn

    x, y, weight = arrays((3, 90, 48), (3, 90, 48), (48,))

    def both(made: Any) -> Callable[..., mx.array]:
        def function(x: mx.array, y: mx.array, weight: mx.array) -> mx.array:
            norm = nn.RMSNorm(48, eps=1e-6)
            norm.weight = weight
            return mx.concatenate(made(x, y, norm), axis=0)

        return function

    compare(both(ops.Ops(False).add_norm), both(lambda x, y, norm: (x + y, norm(x + y))), [x, y, weight], EXACT)


def test_the_best_experts_come_in_order() -> None:
    (scores,) = arrays((500, 32))
    found = np.array(ops.Ops(False).best(scores, 4))
    assert np.array_equal(found, np.argsort(-np.array(scores), axis=-1)[:, :4])


def test_results_do_not_depend_on_the_threads() -> None:
    assert kernels is not None
    x, head, wide = arrays((600, 32), (90, 32), (600, 64))
    targets = mx.arange(600, dtype=mx.int32) % 90
    indices = mx.array(np.random.default_rng(0).integers(0, 6, (600, 2)).astype(np.uint32))
    weights = arrays((6, 16, 32), (6, 16, 32), (6, 32, 16))

    def everything() -> list[np.ndarray]:
        out = kernels.cross_entropy(x, head, targets, mx.ones(600), True)
        out += kernels.experts_vjp(x, indices, wide[:, :2], weights, x, True)
        out += [kernels.mixed_matmul(x.T, wide), kernels.squared_norm(wide)]
        return [np.array(a) for a in out]

    before = kernels.threads()
    try:
        kernels.set_threads(1)
        alone = everything()
        kernels.set_threads(3)
        together = everything()
    finally:
        kernels.set_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_adamw_is_the_papers() -> None:
    assert kernels is not None
    w, g, m, v = arrays((37, 5), (37, 5), (37, 5), (37, 5))
    v = v * v
    found = kernels.adamw(w, g, m, v, 0.5, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.3, 0.2)
    a, b, c, d = (np.array(x, dtype=np.float64) for x in (w, g, m, v))
    b = 0.5 * b
    c, d = 0.9 * c + 0.1 * b, 0.95 * d + 0.05 * b * b
    a = a * (1 - 1e-3) - 1e-2 * (c / 0.3) / (np.sqrt(d / 0.2) + 1e-8)
    for x, expected in zip(found, (a, c, d), strict=True):
        assert off(x, mx.array(expected.astype(np.float32))) < EXACT


@pytest.mark.parametrize(("mixed", "bound"), [(False, 1e-4), (True, 0.1)])
def test_muon_brings_singular_values_near_one(mixed: bool, bound: float) -> None:
    for matrices, found in zip(
        inputs := arrays((3, 24, 64), (64, 24), (2, 2, 40, 40)), ops.Ops(mixed).orthogonal(inputs), strict=True
    ):
        assert off(found, ops._plain_orthogonal(matrices)) < bound
        left, values, right = np.linalg.svd(np.array(matrices), full_matrices=False)
        got = np.linalg.svd(np.array(found), compute_uv=False)
        # The smallest singular value of a square matrix may need more steps.
        assert got.max() < 1.3
        assert got[..., : values.shape[-1] // 2].min() > 0.5
        nearest = left @ right
        assert (np.array(found) * nearest).sum() / np.linalg.norm(found) / np.linalg.norm(nearest) > 0.9


def test_wrong_shapes_are_refused() -> None:
    assert kernels is not None
    x, head = arrays((4, 8), (5, 6))
    with pytest.raises(ValueError, match="cross_entropy"):
        kernels.cross_entropy(x, head, mx.zeros(4, mx.int32), mx.ones(4), False)
    with pytest.raises(ValueError, match="mixed_matmul"):
        kernels.mixed_matmul(x, head)
    with pytest.raises(ValueError, match="experts"):
        kernels.experts(x, mx.zeros((4, 1), mx.uint32), mx.ones((4, 2)), arrays((2, 3, 8), (2, 3, 8), (2, 8, 3)), False)
    with pytest.raises(ValueError, match="starts"):
        kernels.document_attention(
            *arrays((1, 4, 2, 8), (1, 4, 2, 8), (1, 3, 1, 4)), mx.zeros((1, 4), mx.int32), 1.0, 10000.0, True, False
        )
