"""The dense kernels against MLX: values, gradients, strides, and a row's independence of its neighbours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.activations import swiglu_oai

from edger1 import kernels
from edger1.kernels.selftest import selftest

extension: Any = kernels._load()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the kernels are not built")

LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
HALF_LIMIT = {mx.bfloat16: 2e-2, mx.float16: 3e-3}
Operation = Callable[..., mx.array]


@pytest.fixture(autouse=True)
def _seed() -> None:
    mx.random.seed(7)


def normal(*shape: int) -> mx.array:
    return mx.random.normal(shape)


def difference(ours: mx.array, theirs: mx.array) -> float:
    """Largest difference over largest value; infinite for other shapes."""
    assert ours.shape == theirs.shape
    a, b = (np.array(x.astype(mx.float32), dtype=np.float64) for x in (ours, theirs))
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) if a.size else 0.0


def assert_same_gradients(ours: Operation, theirs: Operation, *at: mx.array) -> None:
    weights = normal(*theirs(*at).shape)
    argnums = tuple(range(len(at)))
    found = mx.grad(lambda *args: (ours(*args) * weights).sum(), argnums)(*at)
    expected = mx.grad(lambda *args: (theirs(*args) * weights).sum(), argnums)(*at)
    for a, b in zip(found, expected, strict=True):
        assert difference(a, b) <= GRADIENT_LIMIT


# Matrix products


@settings(max_examples=80, deadline=None)
@given(
    m=st.one_of(st.integers(0, 40), st.integers(41, 300)),
    k=st.integers(1, 600),
    n=st.integers(0, 300),
    flips=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.tuples(*[st.sampled_from([mx.float32, mx.bfloat16, mx.float16])] * 2),
)
def test_matmul_of_any_shape(
    m: int, k: int, n: int, flips: tuple[bool, bool], dtypes: tuple[mx.Dtype, mx.Dtype]
) -> None:
    a = (normal(k, m).T if flips[0] else normal(m, k)).astype(dtypes[0])
    b = (normal(n, k).T if flips[1] else normal(k, n)).astype(dtypes[1])
    ours = extension.matmul(a, b)
    expected = mx.matmul(a.astype(mx.float32), b.astype(mx.float32))
    assert ours.dtype == mx.matmul(a, b).dtype
    assert difference(ours, expected) <= HALF_LIMIT.get(ours.dtype, LIMIT)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((2, 3, 17, 40), (2, 3, 40, 9)),
        ((2, 3, 17, 40), (3, 40, 9)),
        ((2, 1, 4, 40), (2, 3, 40, 9)),
        ((2, 4, 40), (40, 9)),
        ((5, 1, 1, 40), (40, 90)),
        ((1, 3, 33, 20), (4, 1, 20, 7)),
    ],
)
def test_matmul_broadcasts_batches_and_has_both_gradients(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = normal(*left), normal(*right)
    assert difference(extension.matmul(a, b), mx.matmul(a, b)) <= LIMIT
    assert_same_gradients(extension.matmul, mx.matmul, a, b)


def test_matmul_of_views() -> None:
    x = normal(4, 30, 6, 50)[::2, :, 1::2].transpose(0, 2, 1, 3)
    w = normal(64, 100)[:, ::2]
    assert difference(extension.matmul(x, w.T), mx.matmul(x, w.T)) <= LIMIT
    strided = normal(90, 70)[::3, ::2]
    assert difference(extension.matmul(strided, w[:35, :40]), mx.matmul(strided, w[:35, :40])) <= LIMIT


def test_matmul_that_is_not_covered_is_mlx_own() -> None:
    integers = mx.arange(6).reshape(2, 3)
    with pytest.raises(ValueError, match="matmul"):
        extension.matmul(integers, integers.T)
    with pytest.raises(ValueError, match="matmul"):
        extension.matmul(normal(2, 3), normal(4, 5))
    vector = normal(5)
    assert difference(extension.matmul(vector, normal(5, 5) * 0 + 1), mx.full((5,), vector.sum().item())) <= LIMIT


def test_addmm_with_a_bias_and_with_factors() -> None:
    x, w, bias, c = normal(3, 7, 40), normal(40, 50), normal(50), normal(7, 50)
    assert difference(extension.addmm(bias, x, w), mx.addmm(bias, x, w)) <= LIMIT
    assert difference(extension.addmm(c, x, w, 0.5, 2.0), mx.addmm(c, x, w, 0.5, 2.0)) <= LIMIT
    assert_same_gradients(extension.addmm, mx.addmm, bias, x, w)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("k", "n"), [(576, 1536), (300, 77), (33, 5)])
def test_a_row_among_sixteen_is_that_row_alone(k: int, n: int, flipped: bool) -> None:
    x, w = normal(16, k), normal(n, k).T if flipped else normal(k, n)
    together = extension.matmul(x, w)
    for i in range(16):
        assert mx.array_equal(together[i : i + 1], extension.matmul(x[i : i + 1], w))
        assert mx.array_equal(together[: i + 1], extension.matmul(x[: i + 1], w))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("shape", [(6,), (3, 2), (40,)])
def test_gather_mm_in_every_float_type(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    w = normal(5, 48, 32).astype(dtype)
    x = normal(shape[0], *[1] * len(shape), 32).astype(dtype)
    chosen = mx.random.randint(0, 5, shape)
    ours = extension.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=chosen)
    wide = (x.astype(mx.float32), w.astype(mx.float32).swapaxes(-1, -2))
    assert ours.dtype == dtype
    assert difference(ours, mx.gather_mm(*wide, rhs_indices=chosen)) <= HALF_LIMIT.get(dtype, LIMIT)


def test_gather_mm_has_gradients_and_refuses_an_index_beyond() -> None:
    x, w, chosen = normal(4, 1, 8), normal(3, 8, 6), mx.array([2, 0, 0, 1])
    assert_same_gradients(
        lambda a, b: extension.gather_mm(a, b, rhs_indices=chosen),
        lambda a, b: mx.gather_mm(a, b, rhs_indices=chosen),
        x,
        w,
    )
    with pytest.raises(RuntimeError, match="beyond"):
        mx.eval(extension.gather_mm(x, w, rhs_indices=mx.array([2, 0, 0, 3])))


# Rows


ROW_OPERATIONS: dict[str, tuple[Operation, Operation]] = {
    "rms_norm": (lambda x, w, _: extension.rms_norm(x, w, 1e-5), lambda x, w, _: mx.fast.rms_norm(x, w, 1e-5)),
    "rms_norm_plain": (lambda x, *_: extension.rms_norm(x, None, 1e-5), lambda x, *_: mx.fast.rms_norm(x, None, 1e-5)),
    "layer_norm": (
        lambda x, w, b: extension.layer_norm(x, w, b, 1e-5),
        lambda x, w, b: mx.fast.layer_norm(x, w, b, 1e-5),
    ),
    "layer_norm_weighted": (
        lambda x, w, _: extension.layer_norm(x, w, None, 1e-5),
        lambda x, w, _: mx.fast.layer_norm(x, w, None, 1e-5),
    ),
    "layer_norm_biased": (
        lambda x, _, b: extension.layer_norm(x, None, b, 1e-5),
        lambda x, _, b: mx.fast.layer_norm(x, None, b, 1e-5),
    ),
    "softmax": (lambda x, *_: extension.softmax(x, -1), lambda x, *_: mx.softmax(x, -1)),
    "logsumexp": (lambda x, *_: extension.logsumexp(x, -1), lambda x, *_: mx.logsumexp(x, -1)),
    "silu": (lambda x, *_: extension.silu(x), lambda x, *_: x * mx.sigmoid(x)),
    "sigmoid": (lambda x, *_: extension.sigmoid(x), lambda x, *_: mx.sigmoid(x)),
    "tanh": (lambda x, *_: extension.tanh(x), lambda x, *_: mx.tanh(x)),
    "exp": (lambda x, *_: extension.exp(x), lambda x, *_: mx.exp(x)),
    "gelu": (lambda x, *_: extension.gelu(x), lambda x, *_: nn.gelu(x)),
    "gelu_approx": (lambda x, *_: extension.gelu_approx(x), lambda x, *_: nn.gelu_approx(x)),
    "gelu_fast_approx": (lambda x, *_: extension.gelu_fast_approx(x), lambda x, *_: nn.gelu_fast_approx(x)),
    "swiglu": (lambda x, *_: extension.swiglu(x, x[::-1]), lambda x, *_: nn.silu(x) * x[::-1]),
    "swiglu_oai": (lambda x, *_: extension.swiglu_oai(4 * x, -5 * x), lambda x, *_: swiglu_oai(4 * x, -5 * x)),
    "geglu": (lambda x, *_: extension.geglu(x, 2 * x), lambda x, *_: nn.gelu(x) * 2 * x),
    "geglu_approx": (lambda x, *_: extension.geglu_approx(x, 2 * x), lambda x, *_: nn.gelu_approx(x) * 2 * x),
}


@pytest.mark.parametrize("name", ROW_OPERATIONS)
@pytest.mark.parametrize("shape", [(1, 576), (3, 5, 33), (2, 40, 64), (130, 7)])
def test_row_operations_and_their_gradients(name: str, shape: tuple[int, ...]) -> None:
    ours, theirs = ROW_OPERATIONS[name]
    x, weight, bias = normal(*shape), normal(shape[-1]), normal(shape[-1])
    assert difference(ours(x, weight, bias), theirs(x, weight, bias)) <= LIMIT
    assert_same_gradients(ours, theirs, x, weight, bias)
    for view in (x.swapaxes(0, -2), mx.concatenate([x, x], -1)[..., : shape[-1]], mx.repeat(x, 2, -1)[..., ::2]):
        assert difference(ours(view, weight, bias), theirs(view, weight, bias)) <= LIMIT


@pytest.mark.parametrize("name", ROW_OPERATIONS)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_row_operations_in_half_precision(name: str, dtype: mx.Dtype) -> None:
    ours, theirs = ROW_OPERATIONS[name]
    arguments = [normal(6, 100), normal(100), normal(100)]
    narrow = [x.astype(dtype) for x in arguments]
    found = ours(*narrow)
    assert found.dtype == theirs(*narrow).dtype
    assert difference(found, theirs(*[x.astype(mx.float32) for x in narrow])) <= HALF_LIMIT[dtype]


def test_activations_keep_infinities_and_take_plain_numbers() -> None:
    edges = mx.array([-mx.inf, mx.inf, 0.0, -200.0, 200.0])
    for name in ("exp", "sigmoid", "tanh"):
        assert mx.array_equal(getattr(extension, name)(edges), getattr(mx, name)(edges))
        assert difference(getattr(extension, name)(0.25), getattr(mx, name)(0.25)) <= LIMIT
    assert mx.isnan(extension.exp(mx.array([mx.nan]))).all()
    hidden = mx.array([[1.0, -mx.inf, 2.0] * 9])
    assert difference(extension.softmax(hidden, -1), mx.softmax(hidden, -1)) <= LIMIT


@pytest.mark.parametrize("size", [1, 15, 16, 49152])
def test_argmax_takes_the_first_of_the_largest(size: int) -> None:
    x = mx.round(normal(3, size))
    assert mx.array_equal(extension.argmax(x, -1), mx.argmax(x, -1))
    assert mx.array_equal(extension.argmax(x, axis=-1, keepdims=True), mx.argmax(x, axis=-1, keepdims=True))
    assert mx.array_equal(extension.argmax(x), mx.argmax(x))


def test_other_axes_go_to_mlx() -> None:
    x = normal(4, 5, 6)
    assert difference(extension.softmax(x, 0), mx.softmax(x, 0)) <= LIMIT
    assert difference(extension.softmax(x), mx.softmax(x)) <= LIMIT
    assert difference(extension.logsumexp(x, (0, 1)), mx.logsumexp(x, (0, 1))) <= LIMIT
    assert mx.array_equal(extension.argmax(x, 1), mx.argmax(x, 1))


# Rotary embedding


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [16, 24, 64])
@pytest.mark.parametrize("offset", [0, 300, mx.array(5), mx.array([3, 90])], ids=["0", "300", "array", "each"])
@pytest.mark.parametrize("own_frequencies", [False, True])
def test_rope(traditional: bool, dims: int, offset: int | mx.array, own_frequencies: bool) -> None:
    freqs = 1 + 100 * mx.random.uniform(shape=(dims // 2,)) if own_frequencies else None
    options = {"traditional": traditional, "scale": 0.5, "offset": offset, "freqs": freqs}
    options["base"] = None if own_frequencies else 10000.0
    for x in (normal(2, 3, 5, 64), normal(2, 5, 3, 64).transpose(0, 2, 1, 3), normal(2, 5, 64), normal(2, 2, 3, 1, 64)):
        assert difference(extension.rope(x, dims, **options), mx.fast.rope(x, dims, **options)) <= 3e-5
    assert_same_gradients(
        lambda x: extension.rope(x, dims, **options), lambda x: mx.fast.rope(x, dims, **options), normal(2, 3, 5, 64)
    )


# Attention


SHAPES = [
    # batch, heads, key heads, queries, keys, head size, value size
    (1, 9, 3, 1, 1, 64, 64),
    (1, 9, 3, 1, 300, 64, 64),
    (2, 4, 4, 5, 9, 80, 80),
    (1, 8, 1, 3, 700, 96, 32),
    (1, 9, 3, 17, 17, 64, 64),
    (2, 4, 2, 40, 100, 64, 48),
    (1, 6, 2, 300, 600, 33, 17),
]


def masks_for(queries: int, keys: int, batch: int, heads: int) -> dict[str, Any]:
    rows, columns = mx.arange(keys - queries, keys)[:, None], mx.arange(keys)[None]
    window = (rows >= columns) & (rows < columns + 7)
    return {
        "none": None,
        "causal": "causal",
        "window": window,
        "padded": ((columns >= min(3, keys - 1)) & (rows >= columns))[None, None],
        "additive": normal(batch, heads, queries, keys),
        "additive_bf16": mx.where(window, 0.0, -1e9).astype(mx.bfloat16),
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention(shape: tuple[int, ...], dtype: mx.Dtype, with_sinks: bool) -> None:
    batch, heads, key_heads, queries, keys, size, value_size = shape
    q = normal(batch, queries, heads, size).transpose(0, 2, 1, 3)
    k = normal(batch, key_heads, keys + 50, size).astype(dtype)[:, :, :keys]
    v = normal(batch, key_heads, keys + 50, value_size).astype(dtype)[:, :, :keys]
    sinks = normal(heads) if with_sinks else None
    for mask in masks_for(queries, keys, batch, heads).values():
        options = {"scale": 0.125, "mask": mask, "sinks": sinks}
        ours = extension.scaled_dot_product_attention(q, k, v, **options)
        wide = (k.astype(mx.float32), v.astype(mx.float32))
        expected = mx.fast.scaled_dot_product_attention(q, *wide, **options)
        assert difference(ours, expected) <= LIMIT
        merged = (batch, queries, -1)
        swapped = ours.transpose(0, 2, 1, 3).reshape(*merged), expected.transpose(0, 2, 1, 3).reshape(*merged)
        assert difference(*swapped) <= LIMIT


@pytest.mark.parametrize("kind", ["none", "causal", "window", "padded", "additive"])
@pytest.mark.parametrize("shape", [(1, 4, 2, 3, 20, 16, 16), (2, 4, 1, 30, 30, 24, 8)], ids=str)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_gradients_of_attention(kind: str, shape: tuple[int, ...], with_sinks: bool) -> None:
    batch, heads, key_heads, queries, keys, size, value_size = shape
    options = {"scale": 0.25, "mask": masks_for(queries, keys, batch, heads)[kind]}

    def with_options(attention: Operation) -> Operation:
        return lambda q, k, v, *sinks: attention(q, k, v, sinks=sinks[0] if sinks else None, **options)

    assert_same_gradients(
        with_options(extension.scaled_dot_product_attention),
        with_options(mx.fast.scaled_dot_product_attention),
        normal(batch, heads, queries, size),
        normal(batch, key_heads, keys, size),
        normal(batch, key_heads, keys, value_size),
        *([normal(heads)] if with_sinks else []),
    )


@pytest.mark.parametrize(("keys", "queries"), [(40, 16), (700, 9)])
def test_queries_together_are_the_queries_one_at_a_time(keys: int, queries: int) -> None:
    q, k, v = normal(1, 9, queries, 64), normal(1, 3, keys, 64), normal(1, 3, keys, 64)
    together = extension.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal")
    for i in range(queries):
        seen = keys - queries + i + 1
        alone = extension.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, :seen], v[:, :, :seen], scale=0.1)
        assert mx.array_equal(together[:, :, i : i + 1], alone)


def test_long_attention_holds_no_square_of_scores() -> None:
    length = 4096
    q, k, v = normal(1, 2, length, 32), normal(1, 1, length, 32), normal(1, 1, length, 32)
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(extension.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal"))
    assert mx.get_peak_memory() - before < 4 * length * length / 8


# Transformations and threads


def test_transformations() -> None:
    x, w, weight = normal(3, 4, 16), normal(16, 8), normal(16)

    def block(x: mx.array) -> mx.array:
        normed = extension.rms_norm(x, weight, 1e-5)
        return extension.matmul(extension.swiglu(normed, extension.softmax(x, -1)), w)

    plain = block(x)
    assert difference(mx.compile(block)(x), plain) <= LIMIT
    assert difference(mx.vmap(block)(x), plain) <= LIMIT
    assert difference(mx.checkpoint(block)(x), plain) <= LIMIT
    through = mx.grad(lambda x: mx.checkpoint(block)(x).sum())(x)
    assert difference(through, mx.grad(lambda x: block(x).sum())(x)) <= LIMIT
    tangent = normal(*x.shape)
    _, (derivative,) = mx.jvp(block, [x], [tangent])
    step = 1e-3
    numeric = (block(x + step * tangent) - block(x - step * tangent)) / (2 * step)
    assert difference(derivative, numeric) <= 1e-2


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads = extension.threads()
    x, w = normal(16, 512), normal(2048, 512)
    q, k, v = normal(1, 8, 4, 64), normal(1, 2, 1500, 64), normal(1, 2, 1500, 64)
    mx.eval(x, w, q, k, v)

    def results() -> list[np.ndarray]:
        attention = extension.scaled_dot_product_attention(q, k, v, scale=0.1, mask="causal")
        return [np.array(a) for a in (extension.matmul(x, w.T), attention, extension.rms_norm(w, None, 1e-5))]

    try:
        found = []
        for n in (1, 2, 5):
            extension.set_threads(n)
            found.append(results())
    finally:
        extension.set_threads(threads)
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", [] if extension is None else extension.instruction_sets())
def test_every_instruction_set_passes_the_self_test(name: str) -> None:
    program = "from edger1.kernels.selftest import selftest; r = selftest(True); print(r['kernels']['active'], r['ok'])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=_environment(name)
    )
    assert done.stdout.split() == [name, "True"]


def _environment(isa: str) -> dict[str, str]:
    import os

    return {**os.environ, "EDGER1_ISA": isa}


def test_the_self_test_reports_what_it_saw() -> None:
    report = selftest(quick=True)
    assert report["ok"]
    assert {"matmul", "attention", "rope", "rms_norm", "gather_qmm"} <= {c["name"].split()[0] for c in report["checks"]}
    assert not report["timings"]
