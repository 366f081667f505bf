"""4-bit floats: NVFP4 with its two scales under either name, MXFP4 with its codes kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from weight_folders import Arrays, open_folder, windows

from edger1.errors import FormatError
from edger1.quant.formats.numbers import decode_fp8

RNG = np.random.default_rng(5)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
PACKED = RNG.integers(0, 256, (12, 32), np.uint8)
NUMBERS = E2M1[np.stack([PACKED & 15, PACKED >> 4], axis=-1).reshape(12, 64)]
E4M3 = RNG.integers(1, 0x7E, (12, 4), np.uint8)
SCALED = NUMBERS.reshape(12, 4, 16)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_compressed_tensors_divides_by_the_scale_of_the_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    whole = np.full(shape, 1536.0, np.float32)
    arrays: Arrays = {
        "a.weight_packed": ("U8", PACKED), "a.weight_scale": ("F8_E4M3", E4M3), "a.weight_global_scale": ("F32", whole),
        "a.input_global_scale": ("F32", whole),
    }  # fmt: skip
    source = open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"})
    tensor = source.tensors["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    assert (tensor.shape, tensor.dtype, tensor.kind, tensor.coding) == ((12, 64), "BF16", "NVFP4", None)
    expected = (SCALED * (decode_fp8(E4M3, "F8_E4M3") / np.float32(1536))[..., None]).reshape(12, 64)
    for start, stop in windows(12):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("in_config", [True, False])
def test_modelopt_multiplies(tmp_path: Path, in_config: bool) -> None:
    arrays: Arrays = {
        "a.weight": ("U8", PACKED), "a.weight_scale": ("F8_E4M3", E4M3),
        "a.weight_scale_2": ("F32", np.array(0.25, np.float32)), "a.input_scale": ("F32", np.array(1, np.float32)),
    }  # fmt: skip
    if not in_config:
        (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}', encoding="utf-8")
    settings = {"quant_method": "modelopt", "quant_algo": "NVFP4"} if in_config else None
    source = open_folder(tmp_path, arrays, settings)
    assert list(source.tensors) == ["a.weight"]
    expected = (SCALED * (decode_fp8(E4M3, "F8_E4M3") * np.float32(0.25))[..., None]).reshape(12, 64)
    np.testing.assert_array_equal(source.tensors["a.weight"].read(2, 9), expected[2:9])


@pytest.mark.parametrize("dtype", ["U8", "F8_E8M0"])
def test_mxfp4_is_kept(tmp_path: Path, dtype: str) -> None:
    scales = RNG.integers(110, 140, (12, 2), np.uint8)
    arrays: Arrays = {"a.weight_packed": ("U8", PACKED), "a.weight_scale": (dtype, scales)}
    settings = {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"}
    tensor = open_folder(tmp_path, arrays, settings).tensors["a.weight"]
    expected = mx.dequantize(mx.array(PACKED.view(np.uint32)), mx.array(scales), mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(tensor.read(0, 12), np.array(expected))
    assert tensor.coding is not None
    assert (tensor.coding.mode, tensor.coding.group_size, tensor.coding.scales) == ("mxfp4", 32, "U8")
    codes = tensor.codes(3, 5)
    np.testing.assert_array_equal(codes.weight.data, PACKED[3:5].view(np.uint32))
    np.testing.assert_array_equal(codes.scales.data, scales[3:5])
    assert codes.biases is None


def test_nan_scales_are_named(tmp_path: Path) -> None:
    scales = np.full((12, 2), 127, np.uint8)
    scales[4, 0] = 255
    arrays: Arrays = {"a.weight_packed": ("U8", PACKED), "a.weight_scale": ("U8", scales)}
    tensor = open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors"}).tensors["a.weight"]
    for take in (tensor.read, tensor.codes):
        take(0, 4)
        with pytest.raises(FormatError, match=r"'a\.weight'.*NaN"):
            take(4, 5)


def test_gpt_oss_keeps_its_own_names_and_bytes(tmp_path: Path) -> None:
    blocks, scales = RNG.integers(0, 256, (2, 6, 2, 16), np.uint8), RNG.integers(100, 140, (2, 6, 2), np.uint8)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    arrays: Arrays = {f"{path}_blocks": ("U8", blocks), f"{path}_scales": ("U8", scales)}
    tensors = open_folder(tmp_path, arrays, {"quant_method": "mxfp4"}).tensors
    assert [tensors[f"{path}_{part}"].dtype for part in ("blocks", "scales")] == ["U8", "U8"]
    np.testing.assert_array_equal(tensors[f"{path}_blocks"].read(1, 2), blocks[1:])
    np.testing.assert_array_equal(tensors[f"{path}_scales"].read(0, 2), scales)


NVFP4 = {"a.weight_packed": ("U8", PACKED), "a.weight_scale": ("F8_E4M3", E4M3)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.weight_packed": NVFP4["a.weight_packed"]}, r"needs 'a\.weight_scale' beside it"),
        ({**NVFP4, "a.weight_scale": ("F8_E4M3", E4M3[:, :3])}, r"shape \[12, 3\]"),
        ({**NVFP4, "a.weight_scale": ("F32", np.ones((12, 4), np.float32))}, "dtype F32"),
        ({**NVFP4, "a.weight_global_scale": ("F32", np.ones(2, np.float32))}, r"shape \[2\]"),
        ({**NVFP4, "a.weight_packed": ("U8", PACKED[:, :30])}, "no whole groups of 16"),
        ({**NVFP4, "a.weight_packed": ("U8", PACKED[0])}, "1 dimensions instead of 2"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, arrays: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors"})


def test_a_divisor_of_zero_is_noticed(tmp_path: Path) -> None:
    arrays: Arrays = {**NVFP4, "a.weight_global_scale": ("F32", np.zeros(1, np.float32))}
    with pytest.raises(FormatError, match=r"'a\.weight' holds"):
        open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors"}).tensors["a.weight"].read(0, 1)
