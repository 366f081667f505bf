"""compressed-tensors' whole numbers: packed in any bits, symmetric or not, by group, row or tensor, and by bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from packed_layers import Layer
from weight_folders import Arrays, bf16, from_bf16, open_folder, windows

from edger1.errors import FormatError


def scheme(bits: int, group_size: int | None) -> dict[str, Any]:
    return {"type": "int", "num_bits": bits, "group_size": group_size, "strategy": "group" if group_size else "channel"}


def settings(*schemes: dict[str, Any]) -> dict[str, Any]:
    groups = {f"group_{index}": {"weights": each} for index, each in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_number_of_bits(tmp_path: Path, bits: int, symmetric: bool) -> None:
    layer = Layer.random(40, 128, bits, 32)
    if symmetric:
        layer.zeros[:] = 1 << bits - 1
    arrays = layer.compressed("a", symmetric=symmetric)
    source = open_folder(tmp_path, arrays, settings(scheme(bits, 32)))
    tensor = source.tensors["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    assert (tensor.shape, tensor.dtype, tensor.kind) == ((40, 128), "F16", f"compressed-tensors int{bits}")
    for start, stop in windows(40):
        np.testing.assert_array_equal(tensor.read(start, stop), layer.numbers()[start:stop])
    if bits == 7:
        assert tensor.coding is None
        return
    assert tensor.coding is not None
    assert tensor.coding.biases == ("F16" if symmetric else "F32")
    codes = tensor.codes(31, 35)
    assert codes.biases is not None
    parts = [mx.array(part.data.astype(np.float32)) for part in (codes.scales, codes.biases)]
    theirs = mx.dequantize(mx.array(codes.weight.data), *parts, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(theirs), layer.numbers()[31:35])


@pytest.mark.parametrize("columns", [96, 100])
def test_a_scale_for_each_row(tmp_path: Path, columns: int) -> None:
    layer = Layer.random(24, columns, 4, columns)
    tensor = open_folder(tmp_path, layer.compressed("a"), settings(scheme(4, None))).tensors["a.weight"]
    assert tensor.shape == (24, columns)
    np.testing.assert_array_equal(tensor.read(5, 20), layer.numbers()[5:20])


def test_act_order(tmp_path: Path) -> None:
    layer = Layer.random(32, 128, 4, 32, act_order=True)
    tensor = open_folder(tmp_path, layer.compressed("a", order=True), settings(scheme(4, 32))).tensors["a.weight"]
    assert tensor.coding is None
    np.testing.assert_array_equal(tensor.read(5, 20), layer.numbers()[5:20])


def test_layers_of_several_schemes(tmp_path: Path) -> None:
    few, many = Layer.random(32, 128, 4, 32), Layer.random(32, 128, 8, 128)
    arrays = {**few.compressed("few"), **many.compressed("many")}
    tensors = open_folder(tmp_path, arrays, settings(scheme(4, 32), scheme(8, 128))).tensors
    np.testing.assert_array_equal(tensors["few.weight"].read(0, 32), few.numbers())
    np.testing.assert_array_equal(tensors["many.weight"].read(0, 32), many.numbers())


@pytest.mark.parametrize("shape", [(6, 1), (6,), (1,), ()])
def test_whole_bytes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    numbers = rng.integers(-128, 128, (6, 10), np.int8)
    scale = from_bf16(bf16(rng.random(shape, np.float32)))
    zero = rng.integers(-100, 100, shape, np.int8)
    stretched = [part.reshape(-1, 1) if shape else part for part in (scale, zero)]
    expected = (numbers - stretched[1].astype(np.float32)) * stretched[0]
    arrays: Arrays = {
        "a.weight": ("I8", numbers), "a.weight_scale": ("BF16", bf16(scale)), "a.weight_zero_point": ("I8", zero),
    }  # fmt: skip
    tensor = open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors"}).tensors["a.weight"]
    assert tensor.dtype == "BF16"
    for start, stop in windows(6):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


LAYER = Layer.random(32, 128, 4, 32).compressed("a")
GOOD = settings(scheme(4, 32))


@pytest.mark.parametrize(
    ("arrays", "given", "message"),
    [
        (LAYER, settings(), "fits 0 of the schemes"),
        (LAYER, {"quant_method": "compressed-tensors", "config_groups": [1]}, "fits 0 of the schemes"),
        (LAYER, settings(scheme(4, 64)), "fits 0 of the schemes"),
        (LAYER, settings(scheme(9, 32)), "gives 9 bits"),
        (LAYER, settings(scheme(4, -7)), "in groups of -7"),
        ({**LAYER, "a.weight_scale": ("F16", np.ones((31, 4), np.float16))}, GOOD, r"shape \[31, 4\]"),
        ({**LAYER, "a.weight_zero_point": ("I32", np.ones((5, 4), np.int32))}, GOOD, r"shape \[5, 4\]"),
        ({**LAYER, "a.weight_shape": ("I64", np.array([32, 500]))}, GOOD, "says 32 x 500"),
        ({**LAYER, "a.weight_shape": ("I64", np.array([32]))}, GOOD, r"shape \[1\]"),
        ({**LAYER, "a.weight_g_idx": ("I32", np.zeros(5, np.int32))}, GOOD, r"shape \[5\]"),
        ({"a.weight_packed": LAYER["a.weight_packed"]}, GOOD, r"needs 'a\.weight_scale' beside it"),
        ({"a.weight_scale": LAYER["a.weight_scale"]}, GOOD, "belongs to a quantized weight that is missing"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, arrays: Any, given: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path, arrays, given)
