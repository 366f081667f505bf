"""Experts as one operation: what mlx-lm's layers compute, in the same bits wherever the weights lie."""

from __future__ import annotations

import gc
import mmap
import time
from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx_lm.models.switch_layers import SwitchGLU  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from switches import (  # noqa: E402
    EXPERTS,
    EXTENSION,
    FORMATS,
    GATED,
    HIDDEN,
    INNER,
    PLAIN,
    RANKS,
    GeGLU,
    inputs,
    operation,
    plain,
    same_bits,
    switch,
)

from edger1.kernels.experts_fit import Fit, UnfitError, difference  # noqa: E402


@pytest.mark.parametrize("rows", [1, 5, 16, 70])
@pytest.mark.parametrize("how", FORMATS)
def test_experts_give_what_their_weights_say(how: str, rows: int) -> None:
    layer = switch(how=FORMATS[how], inner=128)
    x, indices, weights = inputs(rows)
    call = operation(layer)
    expected = plain(layer, x, indices)
    assert difference(call(x, indices), mx.array(expected, mx.float32)) <= 1e-5
    summed = (expected * np.array(weights)[..., None]).sum(1)
    assert difference(call(x, indices, weights), mx.array(summed, mx.float32)) <= 1e-5


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*GATED, *PLAIN])
def test_every_activation_is_found_and_computed(name: str, bias: bool, rows: int) -> None:
    layer = switch({**GATED, **PLAIN}[name], FORMATS["f32"], bias)
    x, indices, _ = inputs(rows)
    expected = mx.array(plain(layer, x * 30, indices), mx.float32)
    assert difference(operation(layer)(x * 30, indices), expected) <= 1e-5


def test_an_activation_that_is_not_known_is_left_alone() -> None:
    with pytest.raises(UnfitError, match="computes something else"):
        operation(switch(GeGLU(mx.tanh)))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("how", ["4 bits", "3 bits", "mxfp4", "f32", "bf16"])
def test_a_row_among_sixteen_is_the_row_alone(how: str, precision: str) -> None:
    call = operation(switch(how=FORMATS[how], bias=True), precision)
    x, indices, weights = inputs(16)
    together = call(x, indices, weights)
    mx.eval(together)
    threads = EXTENSION.threads()
    try:
        for n in (1, 2, 3):
            EXTENSION.set_threads(n)
            assert same_bits(call(x, indices, weights), together)
            alone = [call(x[i : i + 1], indices[i : i + 1], weights[i : i + 1]) for i in range(16)]
            assert same_bits(mx.concatenate(alone), together)
    finally:
        EXTENSION.set_threads(threads)


@pytest.mark.parametrize("rows", [3, 60])
def test_ranks_are_summed_in_their_order(rows: int) -> None:
    # Whoever computes ranks apart, as their weights arrive, gets the same bits by adding in order.
    call = operation(switch())
    x, indices, weights = inputs(rows)
    ranks, summed = call(x, indices), call(x, indices, weights)
    by_hand = ranks[:, 0] * weights[:, :1]
    for r in range(1, RANKS):
        by_hand = by_hand + ranks[:, r] * weights[:, r : r + 1]
    assert same_bits(by_hand, summed)


def test_a_large_block_of_columns_is_the_sum_of_small_ones() -> None:
    # More pairs than one block of temporary columns holds.
    layer = SwitchGLU(32, 4096, 2)
    nn.quantize(layer, group_size=32, bits=4)
    call = operation(layer)
    x = mx.random.normal((1500, 32))
    indices = mx.zeros((1500, 2), mx.uint32) + mx.array([0, 1], mx.uint32)
    weights = mx.random.uniform(shape=(1500, 2))
    few = mx.concatenate([call(x[i : i + 8], indices[:8], weights[i : i + 8]) for i in range(0, 1500, 8)][:-1])
    assert difference(call(x, indices, weights)[: few.shape[0]], few) <= 1e-5


def test_slots_of_a_bank_are_experts_and_may_be_overwritten() -> None:
    layer, bank = switch(), switch()
    order = [4, 2, 0, 5, 1, 3]
    for ours, theirs in zip(bank.children().values(), layer.children().values(), strict=True):
        for key in ("weight", "scales", "biases"):
            if key in ours:
                ours[key] = mx.zeros_like(theirs[key])
    mx.eval(bank.parameters())
    call = Fit("exact", EXTENSION).start(bank, "swiglu")
    call.finish()
    for ours, theirs in zip(bank.children().values(), layer.children().values(), strict=True):
        for key in ("weight", "scales", "biases"):
            if key in ours:
                np.array(ours[key], copy=False)[:] = np.array(theirs[key])[order]
    x, indices, weights = inputs(4)
    slots = mx.array(np.argsort(order).astype(np.uint32))[indices]
    assert same_bits(call(x, slots, weights), operation(layer)(x, indices, weights))


@pytest.mark.parametrize("how", ["4 bits", "mxfp4", "f32", "bf16"])
def test_experts_in_a_mapped_file_give_the_same_bits(how: str, tmp_path: Path) -> None:
    layer = switch(how=FORMATS[how])
    path = tmp_path / "experts"
    places: dict[tuple[str, str, int], tuple[int, int]] = {}
    with path.open("wb") as file:
        for name in ("gate", "up", "down"):
            for key, a in layer[f"{name}_proj"].items():
                if not isinstance(a, mx.array):
                    continue
                rows = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
                for e in reversed(range(EXPERTS)):
                    places[name, key, e] = (file.tell(), rows[e].nbytes)
                    file.write(rows[e].tobytes() + b"\0" * 8)
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def slices(name: str, key: str) -> list[memoryview]:
        found = [places.get((name, key, e)) for e in range(EXPERTS)]
        return [view[place[0] : sum(place)] for place in found if place]

    call = EXTENSION.Experts()
    for name in ("gate", "up", "down"):
        linear = layer[f"{name}_proj"]
        quantized = "scales" in linear
        n, k = (INNER, HIDDEN) if name != "down" else (HIDDEN, INNER)
        options = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode} if quantized else {}
        dtype = mx.float32 if quantized else linear["weight"].dtype
        call.project_mapped(
            name, n, k, dtype, slices(name, "weight"), slices(name, "scales"), slices(name, "biases"), **options
        )
    call.finish()
    for rows in (3, 60):
        x, indices, weights = inputs(rows)
        assert same_bits(call(x, indices, weights), operation(layer)(x, indices, weights))


def test_mapped_experts_stay_as_long_as_an_operation_over_them_is_to_run(tmp_path: Path) -> None:
    rows = np.random.default_rng(5).standard_normal((3, 8, 16)).astype(np.float32)
    path = tmp_path / "experts"
    path.write_bytes(rows.tobytes())
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    call = EXTENSION.Experts(activation="relu")
    for name, n, k in (("up", 8, 16), ("down", 16, 8)):
        call.project_mapped(name, n, k, mx.float32, [memoryview(mapped)[e * 512 : (e + 1) * 512] for e in range(3)])
    call.finish()
    result = call(mx.ones((1, 16)), mx.array([[2, 0]], mx.uint32))
    del call
    gc.collect()
    with pytest.raises(BufferError):
        mapped.close()
    up, down = rows[[2, 0]], rows[[2, 0]].reshape(2, 16, 8)
    expected = np.einsum("rnk,rk->rn", down, np.maximum(up.sum(-1), 0))
    assert difference(result[0], mx.array(expected)) <= 1e-5
    # The last to hold them was MLX's thread, which leaves giving them back to this one.
    del result
    deadline = time.monotonic() + 20
    while True:
        try:
            mapped.close()
            break
        except BufferError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_what_does_not_fit_is_refused_before_memory_is_touched() -> None:
    layer = switch()
    up = layer.up_proj
    call = EXTENSION.Experts()
    with pytest.raises(ValueError, match='activation is "cubist"'):
        EXTENSION.Experts(activation="cubist")
    with pytest.raises(ValueError, match="expected experts, rows and columns"):
        call.project("up", up["weight"][0], up["scales"][0], up["biases"][0], group_size=32)
    with pytest.raises(ValueError, match="do not fit codes"):
        call.project("up", up["weight"], up["scales"][:, :-1], up["biases"], group_size=32)
    with pytest.raises(ValueError, match="not one of the kernels'"):
        call.project("up", up["weight"], up["scales"], up["biases"], group_size=16)
    with pytest.raises(ValueError, match="were given for 2 experts; expected 3"):
        call.project_mapped("up", 4, 32, mx.float32, [b"\0" * 64] * 3, [b""] * 2, group_size=32, bits=4)
    with pytest.raises(ValueError, match="have 127 bytes"):
        call.project_mapped("up", 4, 8, mx.float32, [b"\0" * 127])
    call.project("up", up["weight"], up["scales"], up["biases"], group_size=32)
    with pytest.raises(ValueError, match="takes gate and up; got no gate"):
        call.finish()
    call.project("router", mx.zeros((EXPERTS, HIDDEN)))
    with pytest.raises(ValueError, match="chooses 7 of 6 experts"):
        call.router(ranks=7)


def test_what_does_not_apply_is_no_operation() -> None:
    call = operation(switch())
    x, indices, weights = inputs(2)
    assert call(x.astype(mx.bfloat16), indices) is None
    assert call(x[:, :64], indices) is None
    assert call(x, indices[:1]) is None
    assert call(x, indices.astype(mx.float32)) is None
    assert call(x, indices, weights[:, :2]) is None
    assert call.layer(x) is None
    assert call.route(x) is None


def test_an_index_beyond_the_experts_is_an_error() -> None:
    call = operation(switch())
    x, indices, _ = inputs(2)
    with pytest.raises(RuntimeError, match="index 99 where there are 6 experts"):
        mx.eval(call(x, mx.full(indices.shape, 99, mx.uint32)))
    with pytest.raises(RuntimeError, match="where there are 6 experts"):
        mx.eval(call(x, mx.full(indices.shape, -1, mx.int32)))


def test_strided_inputs_are_read_where_they_lie() -> None:
    call = operation(switch())
    x, indices, weights = inputs(8)
    expected = call(x[::2], mx.contiguous(indices[::2, ::-1]), mx.contiguous(weights[::2, ::-1]))
    turned = mx.contiguous(x.T).T
    assert same_bits(call(turned[::2], indices[::2, ::-1].astype(mx.int32), weights[::2, ::-1, None]), expected)
