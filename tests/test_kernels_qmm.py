"""The quantized products against float64 products of the dequantized weights, and against MLX's own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1 import kernels
from edger1.kernels.quantized import BiasRatio, gather_qmm, quantized_matmul

extension = kernels._load()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the kernels are not built")

EXAMPLES = int(os.environ.get("EDGER1_TEST_EXAMPLES", "150"))
FORMATS = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)] + [("mxfp4", 4, 32)]
ROUNDING = {mx.float32: 1e-5, mx.bfloat16: 2**-8, mx.float16: 2**-10}


@dataclass(frozen=True)
class Weights:
    """A quantized matrix and what it stands for, in float64."""

    packed: mx.array
    scales: mx.array
    biases: mx.array | None
    dense: np.ndarray
    mode: str
    bits: int
    group: int

    def arguments(self) -> tuple:
        return self.packed, self.scales, self.biases

    def options(self, **more: object) -> dict:
        return {"group_size": self.group, "bits": self.bits, "mode": self.mode, **more}


def make_weights(
    shape: tuple[int, ...], form: tuple[str, int, int], seed: int, dtype: mx.Dtype = mx.float32
) -> Weights:
    mode, bits, group = form
    key = mx.random.key(seed)
    packed, scales, *biases = mx.quantize(mx.random.normal(shape, key=key), group, bits, mode=mode)
    if mode == "affine":
        scales, biases = scales.astype(dtype), [biases[0].astype(dtype)]
        exact = [scales.astype(mx.float32), biases[0].astype(mx.float32)]
        dense = mx.dequantize(packed, *exact, group, bits)
    else:
        dense = mx.dequantize(packed, scales, None, group, bits, mode=mode, dtype=mx.float32)
    return Weights(packed, scales, biases[0] if biases else None, to_numpy(dense), mode, bits, group)


def to_numpy(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32), dtype=np.float64)


def int8_activations(x: np.ndarray, size: int) -> np.ndarray:
    """Round each `size` elements to int8 with one scale, max |x| / 127, in the float32 arithmetic of the kernels."""
    blocks = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // size, size)
    largest = np.abs(blocks).max(-1, keepdims=True)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), np.float32(0))
    return (np.rint(blocks * inverse) * (largest / np.float32(127)).astype(np.float64)).reshape(x.shape)


def without_outliers(x: np.ndarray) -> np.ndarray:
    """Round to int8 by 32, but for the 16 channels that are largest over all rows."""
    largest = np.abs(x.reshape(-1, x.shape[-1])).max(0)
    kept = np.argsort(-largest, kind="stable")[:16]
    rest = x.copy()
    rest[..., kept] = 0
    seen = int8_activations(rest, 32)
    seen[..., kept] = x[..., kept]
    return seen


def bf16(a: np.ndarray) -> np.ndarray:
    return to_numpy(mx.array(a.astype(np.float32)).astype(mx.bfloat16))


def on_tiles(precision: str, transpose: bool, rows: int) -> bool:
    return precision == "fast" and transpose and rows > 16 and extension.active_instruction_set() == "amx"


# A weight on the edge between two bf16 numbers may fall to either side, by how scale * code + bias was rounded.
TILE_ROUNDING = 1e-3


def as_seen_by(
    precision: str, transpose: bool, rows: int, x: np.ndarray, w: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What a product of `rows` rows computes with, instead of x and w."""
    if precision == "exact" or not transpose:
        return x, w
    if on_tiles(precision, transpose, rows):
        return bf16(x), bf16(w)
    return (int8_activations(x, 8) if rows <= 16 else without_outliers(x)), w


def error(got: mx.array, expected: np.ndarray, size: float = 0.0) -> float:
    assert got.shape == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(to_numpy(got) - expected).max() / max(np.abs(expected).max(), size, 1e-30))


def bits_of(a: mx.array) -> bytes:
    return np.array(a.astype(mx.float32)).tobytes()


@st.composite
def problems(draw: st.DrawFn) -> tuple:
    form = draw(st.sampled_from(FORMATS))
    columns = form[2] * draw(st.integers(1, 640 // form[2]))
    outputs = draw(st.integers(1, 80))
    rows = draw(st.one_of(st.integers(0, 20), st.integers(21, 300)))
    dtype = draw(st.sampled_from([mx.float32, mx.bfloat16, mx.float16]))
    scale_dtype = draw(st.sampled_from([mx.float32, mx.bfloat16, mx.float16]))
    return form, columns, outputs, rows, dtype, scale_dtype, draw(st.integers(0, 1 << 16))


@settings(max_examples=EXAMPLES, deadline=None)
@given(problem=problems(), precision=st.sampled_from(["exact", "fast"]), transpose=st.booleans())
def test_product_of_any_format_and_shape(problem, precision, transpose):
    form, columns, outputs, rows, dtype, scale_dtype, seed = problem
    w = make_weights((outputs, columns), form, seed, scale_dtype)
    x = mx.random.normal((rows, columns if transpose else outputs), key=mx.random.key(seed + 1)).astype(dtype)
    seen, dense = as_seen_by(precision, transpose, rows, to_numpy(x), w.dense)
    got = quantized_matmul(x, *w.arguments(), transpose, precision=precision, **w.options())
    assert got.dtype == dtype
    limit = max(ROUNDING[dtype], TILE_ROUNDING if on_tiles(precision, transpose, rows) else 0)
    factor = dense.T if transpose else dense
    # Terms may cancel to nearly nothing; rounding is measured against what they would add up to at random.
    size = float(np.sqrt(seen**2 @ factor**2).max()) if seen.size and factor.size else 0.0
    assert error(got, seen @ factor, size) < limit


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_exact_agrees_with_mlx(form):
    w = make_weights((48, 384), form, 3)
    for rows in (1, 7, 33):
        x = mx.random.normal((rows, 384))
        theirs = mx.quantized_matmul(x, *w.arguments(), **w.options())
        assert error(quantized_matmul(x, *w.arguments(), **w.options()), to_numpy(theirs)) < 1e-5


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_code_is_read_at_every_place_of_a_block(bits, precision):
    values, columns = 1 << bits, 96
    codes = (np.arange(values)[:, None] + np.arange(columns)) % values
    each_bit = (codes[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(each_bit.reshape(values, -1).astype(np.uint8), axis=1, bitorder="little")
    groups = (values, columns // 32)
    w = mx.array(packed.view(np.uint32)), mx.ones(groups), mx.zeros(groups)
    x = 127 * mx.eye(columns)  # the largest that int8 holds, so that it stays what it is

    def product(x: mx.array) -> np.ndarray:
        return np.array(quantized_matmul(x, *w, group_size=32, bits=bits, precision=precision))

    if not on_tiles(precision, True, columns):  # bf16 holds no product of 127 and eight bits
        assert np.array_equal(product(x), 127 * codes.T)
    assert np.array_equal(np.concatenate([product(x[i : i + 16]) for i in range(0, columns, 16)]), 127 * codes.T)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_among_sixteen_is_that_row_alone(form, precision):
    w = make_weights((131, 1152), form, 5)
    x = mx.random.normal((16, 1152))
    before = extension.threads()
    results = set()
    try:
        for threads in (1, 2, 3):
            extension.set_threads(threads)
            for rows in (1, 2, 3, 5, 8, 16):
                pieces = [
                    quantized_matmul(x[i : i + rows], *w.arguments(), precision=precision, **w.options())
                    for i in range(0, 16, rows)
                ]
                results.add(bits_of(mx.concatenate(pieces)))
    finally:
        extension.set_threads(before)
    assert len(results) == 1


@pytest.mark.parametrize("rows", [40, 300])
def test_thread_count_does_not_change_large_products(rows):
    w = make_weights((200, 576), ("affine", 4, 64), 7)
    x = mx.random.normal((rows, 576))
    before = extension.threads()
    try:
        results = set()
        for threads in (1, 2, 5):
            extension.set_threads(threads)
            results.add(bits_of(quantized_matmul(x, *w.arguments(), precision="fast", **w.options())))
    finally:
        extension.set_threads(before)
    assert len(results) == 1


def test_inputs_that_are_not_contiguous():
    form = ("affine", 4, 64)
    w = make_weights((96, 256), form, 11)
    x = mx.random.normal((5, 3, 512))
    views = {
        "every other element": x[..., ::2],
        "transposed rows": mx.swapaxes(x, 0, 1)[..., 100:356],
        "reversed": x[::-1, :, 255::-1],
        "one row for all": mx.broadcast_to(x[:1, :1, :256], (4, 20, 256)),
        "columns as rows": mx.swapaxes(mx.random.normal((2, 256, 7)), 1, 2),
    }
    for name, view in views.items():
        got = quantized_matmul(view, *w.arguments(), **w.options())
        assert error(got, to_numpy(view) @ w.dense.T) < 1e-5, name


def test_weights_that_are_views():
    form = ("affine", 5, 32)
    w = make_weights((64, 320), form, 12)
    x = mx.random.normal((3, 320))
    part = [a[5:60:3] for a in w.arguments()]
    assert error(quantized_matmul(x, *part, **w.options()), to_numpy(x) @ w.dense[5:60:3].T) < 1e-5
    mx.eval(part)
    assert error(quantized_matmul(x, *part, **w.options()), to_numpy(x) @ w.dense[5:60:3].T) < 1e-5
    columns = [w.packed[:, :10], w.scales[:, :2], w.biases[:, :2]]
    mx.eval(columns)
    got = quantized_matmul(x[:, :64], *columns, **w.options())
    assert error(got, to_numpy(x)[:, :64] @ w.dense[:, :64].T) < 1e-5
    padded = mx.pad(w.packed, ((0, 0), (0, 0)))
    strided = mx.contiguous(mx.swapaxes(padded, 0, 1))
    mx.eval(strided)
    got = quantized_matmul(x, mx.swapaxes(strided, 0, 1), w.scales, w.biases, **w.options())
    assert error(got, to_numpy(x) @ w.dense.T) < 1e-5


@pytest.mark.parametrize("transpose", [True, False])
def test_batches_broadcast_as_in_mlx(transpose):
    w = make_weights((2, 1, 24, 64), ("affine", 8, 32), 13)
    x = mx.random.normal((3, 9, 64 if transpose else 24))
    theirs = mx.quantized_matmul(x, *w.arguments(), transpose, **w.options())
    got = quantized_matmul(x, *w.arguments(), transpose, **w.options())
    assert error(got, to_numpy(theirs)) < 1e-5


def test_one_axis_and_empty():
    w = make_weights((24, 64), ("affine", 4, 32), 14)
    x = mx.random.normal((64,))
    assert error(quantized_matmul(x, *w.arguments(), **w.options()), to_numpy(x) @ w.dense.T) < 1e-5
    assert quantized_matmul(mx.zeros((2, 0, 64)), *w.arguments(), **w.options()).shape == (2, 0, 24)
    nothing = [a[:0] for a in w.arguments()]
    assert quantized_matmul(x, *nothing, **w.options()).shape == (0,)
    assert gather_qmm(mx.zeros((0, 1, 64)), w.packed[None], w.scales[None], w.biases[None],
                      rhs_indices=mx.zeros((0,), mx.uint32), **w.options()).shape == (0, 1, 24)  # fmt: skip


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_what_is_not_finite_shows(precision):
    w = make_weights((24, 128), ("affine", 4, 32), 15)
    for bad in (float("nan"), float("inf")):
        for rows in (1, 40):
            x = mx.zeros((rows, 128))
            x[0, 70] = bad
            y = np.array(quantized_matmul(x, *w.arguments(), precision=precision, **w.options()))
            assert not np.isfinite(y[0]).any()
            assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("rows", [3, 40])
def test_gradient_agrees_with_mlx(rows, precision):
    w = make_weights((80, 192), ("affine", 4, 64), 16)
    x = mx.random.normal((2, rows, 192))
    weight = mx.random.normal((2, rows, 80))
    options = w.options()
    ours = mx.grad(lambda x: (quantized_matmul(x, *w.arguments(), precision=precision, **options) * weight).sum())(x)
    theirs = mx.grad(lambda x: (mx.quantized_matmul(x, *w.arguments(), **options) * weight).sum())(x)
    assert error(ours, to_numpy(theirs)) < 1e-5
    back = mx.random.normal((2, rows, 80))
    ours = mx.grad(lambda x: (quantized_matmul(x, *w.arguments(), False, **options) ** 2).sum())(back)
    theirs = mx.grad(lambda x: (mx.quantized_matmul(x, *w.arguments(), False, **options) ** 2).sum())(back)
    assert error(ours, to_numpy(theirs)) < 1e-5


def test_directional_derivative():
    w = make_weights((80, 192), ("affine", 4, 64), 17)
    x, direction = mx.random.normal((4, 192)), mx.random.normal((4, 192))
    _, (ours,) = mx.jvp(lambda x: quantized_matmul(x, *w.arguments(), **w.options()), (x,), (direction,))
    assert error(ours, to_numpy(direction) @ w.dense.T) < 1e-5


def gather_reference(x: np.ndarray, dense: np.ndarray, indices: np.ndarray, transpose: bool) -> np.ndarray:
    chosen = dense[indices]
    return np.matmul(x, np.swapaxes(chosen, -1, -2) if transpose else chosen)


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(
    form=st.sampled_from(FORMATS),
    experts=st.integers(1, 9),
    tokens=st.integers(1, 60),
    top=st.integers(1, 4),
    precision=st.sampled_from(["exact", "fast"]),
    transpose=st.booleans(),
    dtype=st.sampled_from([mx.float32, mx.bfloat16]),
    seed=st.integers(0, 1 << 16),
)
def test_gathered_product(form, experts, tokens, top, precision, transpose, dtype, seed):
    w = make_weights((experts, 40, 256), form, seed)
    mx.random.seed(seed)
    x = mx.random.normal((1, tokens, 1, 1, 256 if transpose else 40)).astype(dtype)
    indices = mx.random.randint(0, experts, (1, tokens, top))
    got = gather_qmm(x, *w.arguments(), rhs_indices=indices, transpose=transpose, precision=precision, **w.options())
    chosen = np.array(indices)
    expected = np.empty((*chosen.shape, 1, got.shape[-1]))
    for expert in range(experts):
        mine = chosen == expert
        seen, dense = as_seen_by(precision, transpose, int(mine.sum()), to_numpy(x), w.dense)
        expected[mine] = gather_reference(seen, dense, chosen, transpose)[mine]
    limit = max(ROUNDING[dtype], TILE_ROUNDING if on_tiles(precision, transpose, tokens * top) else 0)
    assert error(got, expected) < limit


def test_gathered_rows_are_those_rows_alone():
    w = make_weights((6, 64, 256), ("affine", 4, 64), 21)
    mx.random.seed(21)
    x = mx.random.normal((16, 1, 1, 256))
    # Eight rows for each expert: with more than 16 one expert's rows would go the way of many rows.
    indices = (mx.arange(48) * 5 % 6).reshape(16, 3)
    for precision in ("exact", "fast"):
        options = w.options(precision=precision)
        together = gather_qmm(x, *w.arguments(), rhs_indices=indices, **options)
        alone = [gather_qmm(x[i : i + 1], *w.arguments(), rhs_indices=indices[i : i + 1], **options) for i in range(16)]
        assert bits_of(together) == bits_of(mx.concatenate(alone))
        plain = quantized_matmul(x[3, 0], *[a[indices[3, 1]] for a in w.arguments()], **options)
        assert bits_of(together[3, 1]) == bits_of(plain)


def test_gather_takes_what_mlx_takes():
    w = make_weights((5, 40, 128), ("affine", 4, 32), 22)
    x = mx.random.normal((4, 7, 128))
    left, right = mx.array([[3], [1], [0]]), mx.array([4, 2])
    for arguments in ({"lhs_indices": left, "rhs_indices": right}, {"lhs_indices": mx.array([0, 0, 3, 1, 2])}):
        theirs = mx.gather_qmm(x, *w.arguments(), **arguments, **w.options())
        assert error(gather_qmm(x, *w.arguments(), **arguments, **w.options()), to_numpy(theirs)) < 1e-5


@pytest.mark.parametrize("tokens", [2, 50])
def test_gathered_gradient_agrees_with_mlx(tokens):
    w = make_weights((4, 40, 128), ("affine", 4, 64), 23)
    x = mx.random.normal((tokens, 1, 1, 128))
    indices = mx.random.randint(0, 4, (tokens, 3))
    ours = mx.grad(lambda x: (gather_qmm(x, *w.arguments(), rhs_indices=indices, **w.options()) ** 2).sum())(x)
    theirs = mx.grad(lambda x: (mx.gather_qmm(x, *w.arguments(), rhs_indices=indices, **w.options()) ** 2).sum())(x)
    assert error(ours, to_numpy(theirs)) < 1e-5


def test_an_index_beyond_the_experts_is_an_error():
    w = make_weights((3, 40, 128), ("affine", 4, 64), 24)
    for index in (3, -1):
        with pytest.raises(RuntimeError, match="3 matrices"):
            mx.eval(gather_qmm(mx.zeros((1, 1, 128)), *w.arguments(), rhs_indices=mx.array([index]), **w.options()))
    assert mx.array(2).item() == 2


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [8, 64])
def test_fast_is_close_to_exact(form, rows):
    w = make_weights((200, 768), form, 27)
    x = mx.random.normal((rows, 768))
    exact = to_numpy(x) @ w.dense.T
    off = to_numpy(quantized_matmul(x, *w.arguments(), precision="fast", **w.options())) - exact
    assert np.sqrt((off**2).mean() / (exact**2).mean()) < 0.007


@pytest.mark.parametrize("outputs", [31, 64, 100])
@pytest.mark.parametrize("columns", [288, 320, 1216])
@pytest.mark.parametrize("rows", [496, 513, 560, 801])
def test_many_rows(rows, columns, outputs):
    """Sizes about those at which the large path goes on to other rows, columns of W, and columns of the result."""
    w = make_weights((outputs, columns), ("affine", 4, 32), 28)
    x = mx.random.normal((rows, columns), key=mx.random.key(29))
    seen, dense = as_seen_by("fast", True, rows, to_numpy(x), w.dense)
    got = quantized_matmul(x, *w.arguments(), precision="fast", **w.options())
    assert error(got, seen @ dense.T) < (TILE_ROUNDING if on_tiles("fast", True, rows) else ROUNDING[mx.float32])


def test_arguments_that_do_not_fit_are_refused():
    w = make_weights((24, 128), ("affine", 4, 64), 25)
    x = mx.zeros((2, 128))
    good = {"x": x, "w": w.packed, "scales": w.scales, "biases": w.biases, "group_size": 64, "bits": 4}
    wrong = [
        ({"x": mx.zeros((2, 64))}, r"\(2, 64\).*128"),
        ({"scales": w.scales[:, :1]}, r"\(24, 1\).*\(24, 2\)"),
        ({"biases": w.biases[:3]}, r"\(3, 2\).*\(24, 2\)"),
        ({"biases": None}, "biases"),
        ({"biases": w.biases.astype(mx.bfloat16)}, "bfloat16"),
        ({"w": w.packed.astype(mx.int32)}, "int32.*uint32"),
        ({"w": w.packed[0], "scales": w.scales[0], "biases": w.biases[0]}, r"\(16\)"),
        ({"precision": "quick"}, "quick.*exact"),
        ({"bits": 8}, r"24, 2.*24, 1|group"),
        ({"mode": "mxfp4", "group_size": 32, "biases": None}, r"scales.*\(24, 4\)"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            quantized_matmul(**{**good, **change})
    with pytest.raises(ValueError, match="float32"):
        gather_qmm(x, *w.arguments(), rhs_indices=mx.array([0.0]), **w.options())


def test_other_quantizations_go_to_mlx():
    w = mx.random.normal((32, 64))
    packed, scales = mx.quantize(w, 32, 8, mode="mxfp8")
    x = mx.random.normal((2, 64))
    expected = mx.quantized_matmul(x, packed, scales, group_size=32, bits=8, mode="mxfp8")
    got = quantized_matmul(x, packed, scales, group_size=32, bits=8, mode="mxfp8")
    assert bits_of(got) == bits_of(expected)


def test_inside_compiled_functions():
    w = make_weights((24, 128), ("affine", 4, 64), 26)
    x = mx.random.normal((2, 128))
    compiled = mx.compile(lambda x: quantized_matmul(x, *w.arguments(), **w.options()))
    assert bits_of(compiled(x)) == bits_of(quantized_matmul(x, *w.arguments(), **w.options()))


@pytest.mark.skipif("EDGER1_ISA" in os.environ, reason="this is the inner run")
@pytest.mark.parametrize("name", extension.instruction_sets()[:-1] if extension else [])
def test_every_other_instruction_set(name):
    """This file once more in a process that uses another instruction set of this processor."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "EDGER1_ISA": name, "EDGER1_TEST_EXAMPLES": str(EXAMPLES // 4)},
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def test_an_unknown_instruction_set_is_refused():
    code = "from edger1 import kernels; kernels._load()[0].active_instruction_set()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "EDGER1_ISA": "sse9"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "sse9" in run.stderr
    assert "portable" in run.stderr


@pytest.mark.parametrize("precision", ["fast", "exact"])
@pytest.mark.parametrize("bits", [4, 8])
def test_biases_that_follow_from_their_scales_need_not_be_read(bits: int, precision: str) -> None:
    packed = mx.random.randint(0, 2**31 - 1, (96, 192 * bits // 32)).astype(mx.uint32)
    scales = mx.random.uniform(0.01, 0.2, (96, 6)).astype(mx.float16)
    biases = scales * -(2 ** (bits - 1))
    x = mx.random.normal((3, 192))
    mx.eval(packed, scales, biases, x)
    held = BiasRatio()
    assert held.of(packed, scales, biases, 32, bits) == -(2 ** (bits - 1))
    expected = quantized_matmul(x, packed, scales, biases, group_size=32, bits=bits, precision=precision)
    ratio = -(2.0 ** (bits - 1))
    # Instruction sets whose loops read biases all the same get the right ones.
    reads = extension.active_instruction_set() not in ("avx512vnni", "avx512bf16", "amx")
    given = biases if reads else mx.zeros_like(biases)
    got = quantized_matmul(x, packed, scales, given, group_size=32, bits=bits, precision=precision, bias_ratio=ratio)
    assert np.array_equal(np.array(got), np.array(expected))
    others = mx.where(mx.arange(6) == 5, biases + 1, biases)
    mx.eval(others)
    assert held.of(packed, scales, others, 32, bits) == 0
    assert held.of(packed, scales, scales + 1, 32, bits) == 0
