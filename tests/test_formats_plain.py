"""Tensors stored number by number: every dtype comes back as what it means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from weight_folders import bf16, from_bf16, open_folder, windows

from edger1.errors import FormatError
from edger1.quant.opening import open_source

VALUES = (np.random.default_rng(0).standard_normal((9, 6)) * 3).astype(np.float32)


@pytest.mark.parametrize(
    ("dtype", "stored", "expected"),
    [
        ("F32", VALUES, VALUES),
        ("F16", VALUES.astype(np.float16), VALUES.astype(np.float16).astype(np.float32)),
        ("BF16", bf16(VALUES), from_bf16(bf16(VALUES))),
    ],
)
def test_floats_are_widened(tmp_path: Path, dtype: str, stored: np.ndarray, expected: np.ndarray) -> None:
    tensor = open_folder(tmp_path, {"a.weight": (dtype, stored)}).tensors["a.weight"]
    assert (tensor.name, tensor.shape, tensor.dtype, tensor.kind) == ("a.weight", (9, 6), dtype, dtype)
    assert (tensor.nbytes, tensor.coding) == (stored.nbytes, None)
    for start, stop in windows(9):
        read = tensor.read(start, stop)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected[start:stop])


def test_doubles_are_rounded_and_say_so(tmp_path: Path) -> None:
    values = np.array([[1 / 3, 2.0]])
    tensor = open_folder(tmp_path, {"a": ("F64", values)}).tensors["a"]
    assert (tensor.dtype, tensor.kind) == ("F32", "F64 (rounded to F32)")
    np.testing.assert_array_equal(tensor.read(0, 1), values.astype(np.float32))


def test_a_double_beyond_float32_is_refused(tmp_path: Path) -> None:
    tensor = open_folder(tmp_path, {"a": ("F64", np.array([1e300]))}).tensors["a"]
    with pytest.raises(FormatError, match="'a' holds infinities"):
        tensor.read(0, 1)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        ("I64", np.array([[1 << 40, -2]])),
        ("I32", np.array([7, -8], np.int32)),
        ("U8", np.arange(4, dtype=np.uint8)),
        ("BOOL", np.array([True, False])),
    ],
)
def test_whole_numbers_stay_as_they_are(tmp_path: Path, dtype: str, stored: np.ndarray) -> None:
    tensor = open_folder(tmp_path, {"a": (dtype, stored)}).tensors["a"]
    read = tensor.read(0, len(stored))
    assert (tensor.dtype, read.dtype) == (dtype, stored.dtype)
    np.testing.assert_array_equal(read, stored)


def test_8_bit_floats_without_scales_count_as_what_the_model_is_in(tmp_path: Path) -> None:
    raw = np.array([[0x38, 0xB8]], np.uint8)
    tensor = open_folder(tmp_path, {"a": ("F8_E4M3", raw)}, torch_dtype="float16").tensors["a"]
    assert (tensor.dtype, tensor.kind) == ("F16", "F8_E4M3")
    assert tensor.read(0, 1).tolist() == [[1, -1]]


def test_scalars_and_tensors_of_nothing(tmp_path: Path) -> None:
    arrays = {"one": ("F32", np.array(2.5, np.float32)), "none": ("F16", np.zeros((0, 4), np.float16))}
    tensors = open_folder(tmp_path, arrays).tensors
    assert tensors["one"].read(0, 1) == 2.5
    assert tensors["none"].read(0, 0).shape == (0, 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_no_number_is_refused_unless_allowed(tmp_path: Path, dtype: str, bad: float) -> None:
    values = VALUES.copy()
    values[5, 2] = bad
    stored = {"F32": values, "F16": values.astype(np.float16), "BF16": bf16(values)}[dtype]
    tensor = open_folder(tmp_path, {"a.weight": (dtype, stored)}).tensors["a.weight"]
    tensor.read(0, 5)
    with pytest.raises(FormatError, match=r"'a\.weight' holds"):
        tensor.read(4, 6)
    allowed = open_source(tmp_path, allow_nonfinite=True).tensors["a.weight"].read(4, 6)
    assert np.array_equal(allowed[1, 2], bad, equal_nan=True)
