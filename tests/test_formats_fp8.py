"""8-bit floats: the number is the float times its scale, whatever shape the scales have and whichever rows are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from weight_folders import Arrays, bf16, open_folder, windows

from edger1.errors import FormatError
from edger1.quant.formats.numbers import decode_fp8

RNG = np.random.default_rng(3)
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def random_fp8(*shape: int) -> np.ndarray:
    return RNG.integers(0, 0x7F, shape, np.uint8) | RNG.integers(0, 2, shape, np.uint8) << 7


def blockwise(raw: np.ndarray, scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Each number times the scale of its block, by index."""
    row, column = np.arange(raw.shape[-2]) // rows, np.arange(raw.shape[-1]) // columns
    return decode_fp8(raw, "F8_E4M3") * scale[..., row[:, None], column[None, :]]


@pytest.mark.parametrize("shape", [(300, 200), (256, 256), (5, 130), (1, 1), (2, 150, 140)])
def test_blocks_of_128(tmp_path: Path, shape: tuple[int, ...]) -> None:
    *lead, rows, columns = shape
    raw = random_fp8(*shape)
    scale = RNG.random((*lead, -(-rows // 128), -(-columns // 128)), np.float32) + 0.01
    expected = blockwise(raw, scale, 128, 128)
    arrays = {"a.weight": ("F8_E4M3", raw), "a.weight_scale_inv": ("F32", scale)}
    source = open_folder(tmp_path, arrays, FP8)
    tensor = source.tensors["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    assert (tensor.shape, tensor.dtype, tensor.coding) == (shape, "BF16", None)
    assert tensor.nbytes == raw.nbytes + scale.nbytes
    for start, stop in [*windows(shape[0]), (127, 129), (128, 256), (130, 140)]:
        if stop <= shape[0]:
            np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


def test_what_mlx_lm_makes_of_deepseeks_blocks(tmp_path: Path) -> None:
    from mlx_lm.models import deepseek_v3

    raw, scale = random_fp8(200, 300), RNG.random((2, 3), np.float32)
    arrays = {"a.weight": ("F8_E4M3", raw), "a.weight_scale_inv": ("F32", scale)}
    ours = open_folder(tmp_path, arrays, FP8).tensors["a.weight"].read(0, 200)
    model = deepseek_v3.Model(deepseek_v3.ModelArgs(num_hidden_layers=0, vocab_size=8, hidden_size=8))
    theirs = model.sanitize({"a.weight": mx.array(raw), "a.weight_scale_inv": mx.array(scale)})["a.weight"]
    assert mx.array_equal(mx.array(ours).astype(mx.bfloat16), theirs)


@pytest.mark.parametrize(
    ("suffix", "shape", "dtype", "form"),
    [
        ("_scale", (40, 1), "BF16", "per channel"),
        ("_scale", (40,), "F32", "per channel"),
        ("_scale", (), "F32", "per tensor"),
        ("_scale", (1,), "BF16", "per tensor"),
        ("_scale_inv", (1, 1), "F32", "per tensor"),
        ("_scale", (1, 24), "F16", "per channel"),
    ],
)
def test_scales_of_channels_and_of_the_whole(
    tmp_path: Path, suffix: str, shape: tuple[int, ...], dtype: str, form: str
) -> None:
    raw, whole = random_fp8(40, 24), (RNG.integers(1, 200, shape) / 64).astype(np.float32)
    stored = {"BF16": bf16(whole), "F16": whole.astype(np.float16), "F32": whole}[dtype]
    stretched = whole.reshape(-1, 1) if shape == (40,) else whole
    expected = decode_fp8(raw, "F8_E4M3") * stretched
    arrays: Arrays = {"a.weight": ("F8_E4M3", raw), f"a.weight{suffix}": (dtype, stored)}
    tensor = open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors"}).tensors["a.weight"]
    assert tensor.kind == f"F8_E4M3 {form}"
    for start, stop in windows(40):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("shape", [(3, 1, 6), (3, 5, 1), (3, 1, 1), (1, 1, 6)])
def test_stacked_experts_with_stretched_scales(tmp_path: Path, shape: tuple[int, ...]) -> None:
    raw, scale = random_fp8(3, 5, 6), RNG.random(shape, np.float32)
    arrays: Arrays = {"m.experts.gate_up_proj": ("F8_E4M3", raw), "m.experts.gate_up_proj_scale": ("F32", scale)}
    tensor = open_folder(tmp_path, arrays, {"quant_method": "fbgemm_fp8"}).tensors["m.experts.gate_up_proj"]
    expected = decode_fp8(raw, "F8_E4M3") * scale
    for start, stop in [(0, 3), (1, 2), (2, 3)]:
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


def test_e5m2_has_scales_too(tmp_path: Path) -> None:
    raw = RNG.integers(0, 0x7B, (4, 6), np.uint8)
    arrays: Arrays = {"a.weight": ("F8_E5M2", raw), "a.weight_scale": ("F32", np.float32(0.5).reshape(1))}
    tensor = open_folder(tmp_path, arrays, {"quant_method": "fp8"}).tensors["a.weight"]
    np.testing.assert_array_equal(tensor.read(0, 4), decode_fp8(raw, "F8_E5M2") * 0.5)


def test_scales_of_activations_and_caches_are_no_weights(tmp_path: Path) -> None:
    one = ("F32", np.ones(1, np.float32))
    arrays: Arrays = {
        "a.weight": ("F8_E4M3", random_fp8(4, 4)), "a.weight_scale": one, "a.input_scale": one,
        "attn.k_scale": one, "attn.v_scale": one, "experts.gate_up_proj_activation_scale": one,
    }  # fmt: skip
    source = open_folder(tmp_path, arrays, {"quant_method": "compressed-tensors"})
    assert list(source.tensors) == ["a.weight"]
    assert set(source.ignored) == arrays.keys() - {"a.weight", "a.weight_scale"}


SCHEMES: dict[str, tuple[Any, tuple[int, int], str]] = {
    "config_groups": (
        {"config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 32}}}}, (1, 32), "U8",
    ),
    "blocks of E8M0": ({"quant_method": "fp8", "weight_block_size": [32, 32]}, (32, 32), "F8_E8M0"),
    "float powers of two": ({**FP8, "scale_fmt": "ue8m0"}, (128, 128), "F32"),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_powers_of_two_are_kept_as_mxfp8(tmp_path: Path, scheme: str, lead: tuple[int, ...]) -> None:
    settings, (rows, columns), dtype = SCHEMES[scheme]
    raw = random_fp8(*lead, 150, 160)
    exponents = RNG.integers(100, 140, (*lead, -(-150 // rows), -(-160 // columns)), np.uint8)
    scale = np.ldexp(np.float32(1), exponents.astype(int) - 127).astype(np.float32)
    arrays: Arrays = {
        "a.weight": ("F8_E4M3", raw),
        "a.weight_scale_inv": (dtype, scale if dtype == "F32" else exponents),
    }
    tensor = open_folder(tmp_path, arrays, settings).tensors["a.weight"]
    expected = blockwise(raw, scale, rows, columns)
    np.testing.assert_array_equal(tensor.read(0, len(raw)), expected)
    assert tensor.coding is not None
    assert (tensor.coding.mode, tensor.coding.bits, tensor.coding.scales) == ("mxfp8", 8, "U8")
    for start, stop in [(0, len(raw)), (1, 2), (len(raw) - 1, len(raw))]:
        codes = tensor.codes(start, stop)
        assert codes.biases is None
        theirs = mx.dequantize(mx.array(codes.weight.data), mx.array(codes.scales.data), mode="mxfp8", dtype=mx.float32)
        np.testing.assert_array_equal(np.array(theirs), expected[start:stop])


def test_scales_that_are_no_powers_of_two_though_the_config_says_so(tmp_path: Path) -> None:
    arrays: Arrays = {
        "a.weight": ("F8_E4M3", random_fp8(4, 128)), "a.weight_scale_inv": ("F32", np.full((1, 1), 3, np.float32)),
    }  # fmt: skip
    tensor = open_folder(tmp_path, arrays, {**FP8, "scale_fmt": "ue8m0"}).tensors["a.weight"]
    tensor.read(0, 4)
    with pytest.raises(FormatError, match="no powers of two"):
        tensor.codes(0, 4)


def test_nan_is_named(tmp_path: Path) -> None:
    raw = random_fp8(4, 128)
    raw[2, 3] = 0xFF
    arrays: Arrays = {"a.weight": ("F8_E4M3", raw), "a.weight_scale_inv": ("F8_E8M0", np.full((1, 1), 127, np.uint8))}
    tensor = open_folder(tmp_path, arrays, FP8).tensors["a.weight"]
    tensor.read(0, 2)
    with pytest.raises(FormatError, match=r"'a\.weight' holds NaN"):
        tensor.read(2, 4)
    with pytest.raises(FormatError, match=r"'a\.weight' holds NaN"):
        tensor.codes(2, 4)


@pytest.mark.parametrize(
    ("scale", "settings", "message"),
    [
        (("F32", np.ones((3, 2), np.float32)), FP8, r"shape \[3, 2\], but beside .* should have \[2, 1\]"),
        (("I32", np.ones((2, 1), np.int32)), FP8, "dtype I32"),
        (("F32", np.ones((2, 1), np.float32)), {"weight_block_size": [0, 128]}, "size of its blocks"),
        (("F32", np.ones((2, 1), np.float32)), {"weight_block_size": "128"}, "size of its blocks"),
    ],
)
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, scale: Any, settings: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path, {"a.weight": ("F8_E4M3", random_fp8(200, 100)), "a.weight_scale_inv": scale}, settings)


@pytest.mark.parametrize("weight", [None, ("BF16", np.zeros((4, 4), np.uint16))])
def test_scales_of_no_8_bit_floats_are_refused(tmp_path: Path, weight: Any) -> None:
    arrays = {"a.weight_scale_inv": ("F32", np.ones((1, 1), np.float32))} | ({"a.weight": weight} if weight else {})
    with pytest.raises(FormatError, match="belongs to a quantized weight that is missing"):
        open_folder(tmp_path, arrays, FP8)
