"""MLX's own folders: what is read is what MLX dequantizes, and the codes go through untouched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from weight_folders import CONFIG, open_folder, windows

from edger1.errors import FormatError
from edger1.quant.opening import open_source

MODES = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def write(folder: Path, arrays: dict[str, mx.array], **quantization: Any) -> Path:
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization": quantization}), encoding="utf-8")
    return folder


def parts(path: str, arrays: Any) -> dict[str, mx.array]:
    return {f"{path}.{suffix}": part for suffix, part in zip(("weight", "scales", "biases"), arrays, strict=False)}


@pytest.mark.parametrize(("mode", "bits", "group"), MODES)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_every_mode_is_read_as_mlx_reads_it(tmp_path: Path, mode: str, bits: int, group: int, dtype: mx.Dtype) -> None:
    mx.random.seed(0)
    quantized = mx.quantize(mx.random.normal((10, 256)).astype(dtype), group, bits, mode)
    source = open_source(write(tmp_path, parts("a", quantized), bits=bits, group_size=group, mode=mode))
    wide = [part.astype(mx.float32) if part.dtype == dtype else part for part in quantized]
    expected = np.array(mx.dequantize(*wide, group_size=group, bits=bits, mode=mode, dtype=mx.float32))
    tensor = source.tensors["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    assert tensor.shape == (10, 256)
    assert tensor.dtype == ("F16" if mode == "affine" and dtype == mx.float16 else "BF16")
    for start, stop in windows(10):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
    codes = tensor.codes(3, 7)
    np.testing.assert_array_equal(codes.weight.data, np.array(quantized[0])[3:7])
    kept = [codes.scales, codes.biases] if mode == "affine" else [codes.scales]
    for part, theirs in zip(kept, quantized[1:], strict=True):
        assert part is not None
        raw = np.array(theirs.view(mx.uint16) if dtype == mx.bfloat16 and mode == "affine" else theirs)[3:7]
        np.testing.assert_array_equal(part.data.view(raw.dtype), raw)
    assert tensor.coding is not None
    assert (tensor.coding.mode, tensor.coding.bits, tensor.coding.group_size) == (mode, bits, group)
    assert tensor.coding.scales == codes.scales.dtype
    assert tensor.coding.biases == (codes.biases.dtype if codes.biases else None)
    assert "quantization" not in source.config


def test_stacks_of_experts_and_modules_with_bits_of_their_own(tmp_path: Path) -> None:
    mx.random.seed(1)
    stack, other = mx.random.normal((3, 4, 64)), mx.random.normal((4, 128))
    arrays = parts("experts", mx.quantize(stack, 32, 4)) | parts("other", mx.quantize(other, 64, 8))
    arrays |= {"norm.weight": mx.ones(4), "other.bias": mx.zeros(4)}
    own = {"other": {"group_size": 64, "bits": 8}, "experts": True}
    source = open_source(write(tmp_path, arrays, bits=4, group_size=32, **own))
    assert set(source.tensors) == {"experts.weight", "other.weight", "norm.weight", "other.bias"}
    expected = np.array(mx.dequantize(*mx.quantize(stack, 32, 4), 32, 4))
    np.testing.assert_array_equal(source.tensors["experts.weight"].read(1, 2), expected[1:2])
    expected = np.array(mx.dequantize(*mx.quantize(other, 64, 8), 64, 8))
    np.testing.assert_array_equal(source.tensors["other.weight"].read(0, 4), expected)


@pytest.mark.parametrize("shape", [(4, 64), (3, 4, 64)])
def test_a_scale_for_the_whole_counts_and_is_not_carried(tmp_path: Path, shape: tuple[int, ...]) -> None:
    mx.random.seed(2)
    weight = mx.random.normal(shape)
    whole = mx.array(3.0) if len(shape) == 2 else mx.array([1.0, 2.0, 3.0])
    quantized = mx.quantize(weight, 16, 4, "nvfp4")
    arrays = parts("a", quantized) | {"a.global_scale": whole}
    tensor = open_source(write(tmp_path, arrays, bits=4, group_size=16, mode="nvfp4")).tensors["a.weight"]
    assert tensor.coding is None
    plain = np.array(mx.dequantize(*quantized, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32))
    scaled = plain * np.array(whole).reshape(-1, *[1] * (len(shape) - 1))
    np.testing.assert_array_equal(tensor.read(1, 3), scaled[1:3])


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    arrays = parts("a", mx.quantize(mx.random.normal((4, 64)), 32, 4))
    arrays["a.scales"][2, 1] = mx.inf
    tensor = open_source(write(tmp_path, arrays, bits=4, group_size=32)).tensors["a.weight"]
    tensor.codes(0, 2)
    for take in (tensor.codes, tensor.read):
        with pytest.raises(FormatError, match=r"'a\.weight' holds"):
            take(2, 3)
    tensor = open_source(tmp_path, allow_nonfinite=True).tensors["a.weight"]
    assert np.isinf(tensor.codes(2, 3).scales.data).any()


WORDS, SCALES = ("U32", np.zeros((4, 8), np.uint32)), ("F32", np.zeros((4, 2), np.float32))


@pytest.mark.parametrize(
    ("arrays", "quantization", "message"),
    [
        ({"a.weight": WORDS, "a.scales": SCALES}, {"bits": 4, "group_size": 32}, r"needs 'a\.biases' beside it"),
        ({"a.weight": WORDS, "a.scales": SCALES}, {"bits": 3, "group_size": 32}, "do not go together at 3 bits"),
        ({"a.weight": WORDS, "a.scales": SCALES}, {"bits": 4, "group_size": 64}, "do not go together"),
        ({"a.weight": WORDS, "a.scales": SCALES}, {"bits": "4", "group_size": []}, "do not go together"),
        (
            {"a.weight": WORDS, "a.scales": SCALES, "a.biases": ("F32", np.zeros((4, 1), np.float32))},
            {"bits": 4, "group_size": 32},
            r"shape \[4, 1\]",
        ),
        (
            {"a.weight": WORDS, "a.scales": ("U8", np.zeros((4, 2), np.uint8))},
            {"bits": 4, "group_size": 32, "mode": "affine"},
            "scales of 8 bits",
        ),
        ({"a.weight": WORDS, "a.scales": ("I32", np.zeros((4, 2), np.int32))}, {"mode": "mxfp4"}, "dtype I32"),
        ({"a.scales": SCALES}, {"bits": 4, "group_size": 32}, "belongs to a quantized weight"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(
    tmp_path: Path, arrays: Any, quantization: Any, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path, arrays, quantization=quantization)
