"""Codes with zero points: the dtype of the biases holds every product, and codes mean what reading gives."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from packed_layers import Layer
from weight_folders import bf16, from_bf16, open_folder

from edger1.errors import FormatError
from edger1.quant.formats.zero_point import ZeroPointTensor
from edger1.quant.source import Codes, Tensor


def layer_of(folder: Path, layer: Layer, dtype: str = "F16", **settings: object) -> ZeroPointTensor:
    config = {"quant_method": "gptq", "bits": layer.bits, "group_size": layer.group_size, **settings}
    tensor = open_folder(folder, layer.gptq("a", dtype), config).tensors["a.weight"]
    assert isinstance(tensor, ZeroPointTensor)
    return tensor


def numbers_of(tensor: Tensor, codes: Codes) -> np.ndarray:
    """What MLX makes of the codes, in float32."""
    assert tensor.coding is not None
    assert codes.biases is not None
    scales, biases = (
        from_bf16(part.data) if part.dtype == "BF16" else part.data.astype(np.float32)
        for part in (codes.scales, codes.biases)
    )
    coding = tensor.coding
    return np.array(
        mx.dequantize(mx.array(codes.weight.data), mx.array(scales), mx.array(biases), coding.group_size, coding.bits)
    )


@pytest.mark.parametrize("zero", [8, 0, 1, 4])
def test_products_that_fit_in_the_scales_dtype_stay_in_it(tmp_path: Path, zero: int) -> None:
    layer = Layer.random(16, 128, 4, 64)
    layer.zeros[:] = zero
    tensor = layer_of(tmp_path, layer)
    assert tensor.coding is not None
    assert (tensor.coding.scales, tensor.coding.biases) == ("F16", "F16")
    codes = tensor.codes(3, 9)
    assert codes.scales.data.dtype == np.float16
    np.testing.assert_array_equal(numbers_of(tensor, codes), tensor.read(3, 9))


def test_one_product_that_does_not_makes_all_of_them_float32(tmp_path: Path) -> None:
    layer = Layer.random(16, 128, 4, 64)
    layer.zeros[:] = 8
    layer.zeros[9, 1] = 11
    layer.scales[9, 1] = np.float16(1.001)
    tensor = layer_of(tmp_path, layer)
    assert tensor.coding is not None
    assert (tensor.coding.scales, tensor.coding.biases) == ("F32", "F32")
    for start, stop in [(0, 16), (9, 10)]:
        codes = tensor.codes(start, stop)
        assert codes.scales.dtype == "F32"
        np.testing.assert_array_equal(numbers_of(tensor, codes), layer.numbers()[start:stop])


def test_a_product_beyond_float16_is_held_by_float32(tmp_path: Path) -> None:
    layer = Layer.random(16, 128, 4, 64)
    layer.zeros[:] = 8
    layer.scales[2, 0] = 60000
    tensor = layer_of(tmp_path, layer)
    assert tensor.coding is not None
    assert tensor.coding.biases == "F32"
    np.testing.assert_array_equal(numbers_of(tensor, tensor.codes(0, 16)), layer.numbers())


def test_bfloat16_scales(tmp_path: Path) -> None:
    layer = Layer.random(16, 128, 4, 64)
    layer.scales[:] = from_bf16(bf16(layer.scales))
    layer.zeros[:] = 8
    tensor = layer_of(tmp_path / "even", layer, "BF16")
    assert tensor.coding is not None
    assert tensor.coding.scales == "BF16"
    np.testing.assert_array_equal(numbers_of(tensor, tensor.codes(0, 16)), layer.numbers())
    layer.zeros[:] = 7
    layer.scales[:] = from_bf16(np.full(layer.scales.shape, 0x3F81, np.uint16))
    tensor = layer_of(tmp_path / "odd", layer, "BF16")
    assert tensor.coding is not None
    assert tensor.coding.scales == "F32"
    np.testing.assert_array_equal(numbers_of(tensor, tensor.codes(0, 16)), layer.numbers())


def test_float32_scales_are_carried_only_where_float32_holds_the_products(tmp_path: Path) -> None:
    layer = Layer.random(16, 128, 4, 64)
    tensor = layer_of(tmp_path / "short", layer, "F32")
    assert tensor.coding is not None
    np.testing.assert_array_equal(numbers_of(tensor, tensor.codes(0, 16)), layer.numbers())
    layer.scales[:] = np.float32(1 / 3)
    layer.zeros[:] = 7
    assert layer_of(tmp_path / "long", layer, "F32").coding is None


@pytest.mark.parametrize(
    ("columns", "bits", "group"), [(128, 4, 16), (96, 4, 64), (160, 4, 160), (256, 4, 256)], ids=str
)
def test_groups_that_mlx_has_not_are_dequantized_only(tmp_path: Path, columns: int, bits: int, group: int) -> None:
    layer = Layer.random(32, columns, bits, group)
    tensor = layer_of(tmp_path, layer)
    assert tensor.coding is None
    np.testing.assert_array_equal(tensor.read(0, 32), layer.numbers())
    np.testing.assert_array_equal(tensor.read(7, 21), layer.numbers()[7:21])


def test_act_order_is_dequantized_only(tmp_path: Path) -> None:
    layer = Layer.random(32, 128, 4, 32, act_order=True)
    assert layer.order.tolist() != sorted(layer.order)
    tensor = layer_of(tmp_path, layer, desc_act=True)
    assert tensor.coding is None
    np.testing.assert_array_equal(tensor.read(0, 32), layer.numbers())
    np.testing.assert_array_equal(tensor.read(5, 9), layer.numbers()[5:9])


@pytest.mark.parametrize("group", [4, -1])
def test_columns_of_groups_that_are_not_there_are_refused(tmp_path: Path, group: int) -> None:
    layer = Layer.random(32, 128, 4, 32, act_order=True)
    layer.order[3] = group
    with pytest.raises(FormatError, match="names groups from"):
        layer_of(tmp_path, layer).read(0, 1)


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    layer = Layer.random(16, 128, 4, 64)
    layer.scales[4, 1] = np.nan
    tensor = layer_of(tmp_path, layer)
    tensor.read(0, 4)
    for take in (tensor.read, tensor.codes):
        with pytest.raises(FormatError, match=r"'a\.weight' holds NaN"):
            take(4, 5)
