"""Quantized rows read back: embeddings, and attention over quantized caches, against MLX and mlx-lm."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models import base
from mlx_lm.models.cache import QuantizedKVCache

from edger1 import kernels
from edger1.kernels import functions

extension: Any = kernels._load()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the kernels are not built")

LIMIT = 1e-5


def difference(ours: mx.array, theirs: mx.array) -> float:
    """Largest difference over largest value; infinite for other shapes."""
    assert ours.shape == theirs.shape
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (ours, theirs))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) if a.size else 0.0


# Embeddings


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([32, 64, 128]),
    groups=st.integers(1, 5),
    dtype=st.sampled_from([mx.float32, mx.bfloat16, mx.float16]),
    shape=st.sampled_from([(), (1,), (1, 1), (3, 5), (0,), (1, 70)]),
)
def test_rows_of_every_quantization(
    bits: int, group: int, groups: int, dtype: mx.Dtype, shape: tuple[int, ...]
) -> None:
    w, scales, biases = mx.quantize(mx.random.normal((20, group * groups)), group, bits)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    at = mx.random.randint(-20, 20, shape)
    ours = extension.dequantized_rows(w, scales, biases, at, group_size=group, bits=bits)
    wide = mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), group, bits)
    assert ours.dtype == mx.float32
    assert difference(ours, wide[at]) <= 1e-6


def test_rows_of_mxfp4_and_of_a_view() -> None:
    w, scales = mx.quantize(mx.random.normal((9, 96)) * 3, mode="mxfp4")
    expected = mx.dequantize(w, scales, mode="mxfp4", dtype=mx.float32)
    for kind in (mx.uint32, mx.int32, mx.int64, mx.uint8):
        at = mx.array([8, 0, 3], kind)
        ours = extension.dequantized_rows(w, scales, None, at, group_size=32, bits=4, mode="mxfp4")
        assert difference(ours, expected[at]) == 0
    ours = extension.dequantized_rows(w[::2], scales[::2], None, mx.array([4, 1]), group_size=32, bits=4, mode="mxfp4")
    assert difference(ours, expected[::2][mx.array([4, 1])]) == 0


def test_gradients_reach_the_scales() -> None:
    w, scales, biases = mx.quantize(mx.random.normal((9, 64)), 32, 4)
    at, weights = mx.array([1, 1, 5]), mx.random.normal((3, 64))

    def ours(s: mx.array, b: mx.array) -> mx.array:
        return (extension.dequantized_rows(w, s, b, at, group_size=32, bits=4) * weights).sum()

    def theirs(s: mx.array, b: mx.array) -> mx.array:
        return (mx.dequantize(w, s, b, 32, 4)[at] * weights).sum()

    for a, b in zip(mx.grad(ours, (0, 1))(scales, biases), mx.grad(theirs, (0, 1))(scales, biases), strict=True):
        assert difference(a, b) <= LIMIT


def test_what_is_no_quantized_matrix_is_refused() -> None:
    w, scales, biases = mx.quantize(mx.random.normal((9, 64)), 32, 4)
    at = mx.array([1])
    for arguments in (
        (w.astype(mx.int32), scales, biases, at),
        (w, scales[:, :1], biases[:, :1], at),
        (w, scales, None, at),
        (w, scales, biases.astype(mx.float16), at),
        (w, scales, biases, mx.array([1.0])),
    ):
        with pytest.raises(ValueError, match="dequantized_rows"):
            extension.dequantized_rows(*arguments, group_size=32, bits=4)
    with pytest.raises(ValueError, match="7 bits"):
        extension.dequantized_rows(w, scales, biases, at, group_size=32, bits=7)


# Attention


def stored(k: mx.array, v: mx.array, group: int, bits: int) -> tuple[Any, Any]:
    """Quantize keys and values into buffers that are longer than they are, as a cache holds them."""

    def slice_of_buffer(a: mx.array) -> mx.array:
        room = mx.zeros((*a.shape[:2], 29, a.shape[3]), a.dtype)
        return mx.concatenate([a, room], axis=2)[..., : a.shape[2], :]

    keys, values = (tuple(slice_of_buffer(part) for part in mx.quantize(a, group, bits)) for a in (k, v))
    return keys, values


@settings(max_examples=80, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 6, 8]),
    group=st.sampled_from([32, 64]),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (8, 1)]),
    length=st.one_of(st.integers(1, 20), st.integers(21, 300)),
    before=st.integers(0, 600),
    batch=st.integers(1, 2),
    mask=st.sampled_from(["none", "causal", "bool", "add", "window"]),
)
def test_attention_is_mlx_lm_s(
    bits: int, group: int, heads: tuple[int, int], length: int, before: int, batch: int, mask: str
) -> None:
    query_heads, key_heads = heads
    total = before + length
    q = mx.random.normal((batch, query_heads, length, 64))
    k, v = mx.random.normal((batch, key_heads, total, 64)), mx.random.normal((batch, key_heads, total, 64))
    keys, values = stored(k, v, group, bits)
    given_mask: Any = {
        "none": None,
        "causal": "causal",
        "bool": base.create_causal_mask(length, before),
        "add": mx.random.normal((batch, 1, length, total)),
        "window": base.create_causal_mask(length, before, window_size=37),
    }[mask]
    assert extension.covers_quantized_attention(q, keys, values, given_mask, group, bits)
    ours = extension.quantized_attention(q, keys, values, 0.125, given_mask, group, bits)
    theirs = base.quantized_scaled_dot_product_attention(mx.array(q), keys, values, 0.125, given_mask, group, bits)
    assert difference(ours, theirs) <= LIMIT


def test_a_row_among_sixteen_is_that_row_alone() -> None:
    q, k, v = mx.random.normal((1, 6, 16, 64)), mx.random.normal((1, 2, 700, 64)), mx.random.normal((1, 2, 700, 64))
    keys, values = stored(k, v, 64, 8)
    mask = mx.random.normal((16, 700))
    together = extension.quantized_attention(q, keys, values, 0.125, mask, 64, 8)
    for i in range(16):
        one = slice(i, i + 1)
        alone = extension.quantized_attention(q[:, :, one], keys, values, 0.125, mask[one], 64, 8)
        assert mx.array_equal(together[:, :, one], alone)


def test_views_half_types_and_gradients() -> None:
    q = mx.random.normal((2, 5, 4, 64)).swapaxes(1, 2)
    k, v = mx.random.normal((2, 2, 70, 64)), mx.random.normal((2, 2, 70, 64))
    keys, values = stored(k, v, 32, 8)

    def theirs(x: mx.array) -> mx.array:
        return base.quantized_scaled_dot_product_attention(x * 1, keys, values, 0.125, "causal", 32, 8)

    def ours(x: mx.array) -> mx.array:
        return extension.quantized_attention(x, keys, values, 0.125, "causal", 32, 8)

    assert difference(ours(q), theirs(q)) <= LIMIT
    flipped = tuple(mx.contiguous(a.swapaxes(2, 3)).swapaxes(2, 3) for a in keys)
    assert mx.array_equal(extension.quantized_attention(q, flipped, values, 0.125, "causal", 32, 8), ours(q))
    half = q.astype(mx.bfloat16)
    assert ours(half).dtype == mx.bfloat16
    assert difference(ours(half), theirs(half.astype(mx.float32))) <= 1e-2
    weights = mx.random.normal(theirs(q).shape)
    found, expected = (mx.grad(lambda x, f=f: (f(x) * weights).sum())(q) for f in (ours, theirs))
    assert difference(found, expected) <= 1e-4


def test_what_is_not_covered_says_so() -> None:
    q, k = mx.random.normal((1, 4, 2, 64)), mx.random.normal((1, 2, 9, 64))
    keys, values = stored(k, k, 64, 4)
    wrong: list[tuple[Any, ...]] = [
        (q[:, :3], keys, values, None, 64, 4),
        (q, keys, values, None, 32, 4),
        (q, keys, values, None, 64, 8),
        (q[..., :32], keys, values, None, 64, 4),
        (q, keys, values, mx.zeros((4, 2, 9)), 64, 4),
        (q, keys, values, mx.zeros((2, 8)), 64, 4),
        (q, keys, (values[0][:, :, :5], values[1], values[2]), None, 64, 4),
    ]
    for arguments in wrong:
        assert not extension.covers_quantized_attention(*arguments)
        with pytest.raises(ValueError, match="quantized_attention"):
            extension.quantized_attention(*arguments[:3], 1.0, *arguments[3:])


def test_mlx_lm_s_attention_runs_on_it_while_the_functions_are_in_place() -> None:
    q, k = mx.random.normal((1, 4, 2, 64)), mx.random.normal((1, 2, 9, 64))
    cache = QuantizedKVCache(64, 8)
    keys, values = (tuple(parts) for parts in cache.update_and_fetch(k, k))
    expected = base.scaled_dot_product_attention(mx.array(q), keys, values, cache, 0.125, "causal")
    functions.acquire(extension)
    try:
        found = base.scaled_dot_product_attention(mx.array(q), keys, values, cache, 0.125, "causal")
        ours = extension.quantized_attention(q, keys, values, 0.125, "causal", 64, 8)
        with pytest.raises(ValueError, match="sinks"):
            base.scaled_dot_product_attention(q, keys, values, cache, 0.125, None, sinks=mx.zeros((4,)))
    finally:
        functions.release()
    assert mx.array_equal(found, ours)
    assert difference(found, expected) <= LIMIT


def test_a_quantized_embedding_uses_them() -> None:
    from edger1.kernels import install

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.QuantizedEmbedding(50, 128, 32, 4)

        def __call__(self, x: mx.array) -> mx.array:
            return self.embed(x)

    model, at = Model(), mx.array([[3, 49, 0]])
    expected = model(at)
    installed = install.install(model)
    try:
        assert difference(model(at), expected) <= 1e-6
    finally:
        installed.uninstall()
