"""Sorting and selecting against MLX: order, ties, NaNs, axes, dtypes and gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1 import kernels

extension: Any = kernels._load()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the kernels are not built")

DTYPES = [mx.float32, mx.bfloat16, mx.float16, mx.int32, mx.uint32]
# Long enough for each way that rows are ordered.
LENGTHS = st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1500, 4096, 5003, 9001]))


def values(seed: int, shape: tuple[int, ...], dtype: mx.Dtype, distinct: int) -> mx.array:
    """Random numbers of few different values, among them both zeros, infinities and NaN where the dtype has them."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(-distinct, distinct + 1, shape)
    if dtype in (mx.int32, mx.uint32):
        return mx.array(drawn.astype(np.int32)).astype(mx.int32).view(dtype)
    floats = drawn * np.float32(0.37) * np.where(rng.random(shape) < 0.5, 1, -1).astype(np.float32)
    for special, share in ((np.nan, 0.03), (np.inf, 0.02), (-np.inf, 0.02)):
        floats = np.where(rng.random(shape) < share, np.float32(special), floats)
    return mx.array(floats.astype(np.float32)).astype(dtype)


def bits(a: mx.array) -> np.ndarray:
    """The bits of each element, so that zeros and NaNs are told apart."""
    return np.array(a.view(mx.uint16 if a.dtype.size == 2 else mx.uint32))


@settings(max_examples=120, deadline=None)
@given(
    n=LENGTHS,
    rows=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    distinct=st.sampled_from([1, 5, 10**6]),
    dtype=st.sampled_from(DTYPES),
    axis=st.sampled_from([-1, 0, 1, None]),
    strided=st.booleans(),
)
def test_sort_and_argsort_are_mlx_own(
    n: int, rows: int, seed: int, distinct: int, dtype: mx.Dtype, axis: int | None, strided: bool
) -> None:
    x = values(seed, (rows, 2 * n if strided else n), dtype, distinct)
    if strided:
        x = x[:, ::2]
    if axis == 0:
        x = x.T
    assert np.array_equal(np.array(extension.argsort(x, axis=axis)), np.array(mx.argsort(x, axis=axis)))
    assert np.array_equal(bits(extension.sort(x, axis=axis)), bits(mx.sort(x, axis=axis)))


@settings(max_examples=120, deadline=None)
@given(
    n=LENGTHS,
    rows=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    distinct=st.sampled_from([1, 5, 10**6]),
    dtype=st.sampled_from(DTYPES),
    axis=st.sampled_from([-1, 0]),
    place=st.floats(0, 1),
    negative=st.booleans(),
)
def test_a_partition_has_every_element_on_its_side(
    n: int, rows: int, seed: int, distinct: int, dtype: mx.Dtype, axis: int, place: float, negative: bool
) -> None:
    x = values(seed, (rows, n), dtype, distinct)
    if axis == 0:
        x = x.T
    kth = min(int(place * n), n - 1)
    given_kth = kth - n if negative else kth
    found = np.moveaxis(np.array(extension.argpartition(x, given_kth, axis=axis)), axis, -1)
    ordered = np.array(mx.argsort(mx.argsort(x, axis=axis), axis=axis))
    ranks = np.take_along_axis(np.moveaxis(ordered, axis, -1), found.astype(np.int64), -1)
    # Ranks are those of the stable order, so ties are decided as well: the first of equal ones come first.
    assert np.array_equal(np.sort(ranks, -1), np.broadcast_to(np.arange(n), ranks.shape))
    assert (ranks[:, :kth] < kth).all()
    assert (ranks[:, kth] == kth).all()
    partitioned = extension.partition(x, given_kth, axis=axis)
    chosen = mx.take_along_axis(x, extension.argpartition(x, given_kth, axis=axis), axis=axis)
    assert np.array_equal(bits(partitioned), bits(chosen))


@pytest.mark.parametrize(("shape", "axis"), [((3, 64), -1), ((3, 64), 0), ((2, 9, 4), 1), ((49_152,), None), ((7,), 0)])
def test_topk_has_the_largest(shape: tuple[int, ...], axis: int | None) -> None:
    x = mx.random.normal(shape)
    n = x.size if axis is None else x.shape[axis]
    for k in {1, 2, n // 2, n - 1, n}:
        if k < 1 or k > n:
            continue
        ours, theirs = extension.topk(x, k, axis=axis), mx.topk(x, k, axis=axis)
        assert mx.array_equal(mx.sort(ours, axis=axis), mx.sort(theirs, axis=axis))


def test_what_is_asked_for_beyond_the_axis_is_mlx_own_error() -> None:
    x = mx.random.normal((2, 5))
    for call in (
        lambda: extension.argpartition(x, 5),
        lambda: extension.partition(x, -6),
        lambda: extension.sort(x, axis=2),
        lambda: extension.topk(x, 6),
    ):
        with pytest.raises((ValueError, IndexError), match="topk|artition|axis|Axis"):
            mx.eval(call())


def test_empty_and_other_dtypes_are_mlx_own() -> None:
    assert extension.sort(mx.zeros((0,))).shape == (0,)
    assert extension.argsort(mx.zeros((3, 0)), axis=-1).shape == (3, 0)
    assert extension.sort(mx.array([3, 1, 2], mx.int8)).tolist() == [1, 2, 3]


def test_gradients_flow_to_where_values_came_from() -> None:
    x, weights = mx.random.normal((4, 33)), mx.random.normal((4, 33))
    ours = mx.grad(lambda a: (extension.sort(a, axis=-1) * weights).sum())(x)
    assert mx.allclose(ours, mx.grad(lambda a: (mx.sort(a, axis=-1) * weights).sum())(x))
    largest = mx.grad(lambda a: extension.topk(a, 5).sum())(x)
    assert mx.array_equal(largest, (x >= mx.sort(x, axis=-1)[:, -5:-4]).astype(mx.float32))
    assert mx.abs(mx.grad(lambda a: (extension.argsort(a).astype(mx.float32) * weights).sum())(x)).max().item() == 0


def test_the_same_row_is_partitioned_alike_whatever_is_beside_it() -> None:
    x = mx.random.normal((64, 200))
    together = extension.argpartition(x, 7)
    for i in range(64):
        assert mx.array_equal(together[i], extension.argpartition(x[i], 7))


def test_sorting_works_under_vmap() -> None:
    x = mx.random.normal((3, 40))
    assert mx.array_equal(mx.vmap(lambda a: extension.sort(a))(x), mx.sort(x, axis=-1))
