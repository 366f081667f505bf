"""AWQ: what is read is what mlx-lm's own unpacking gives, for any rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from packed_layers import Layer
from weight_folders import open_folder, windows

from edger1.errors import FormatError

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}


def test_rows_and_codes(tmp_path: Path) -> None:
    layer = Layer.random(40, 128, 4, 32)
    source = open_folder(tmp_path, layer.awq("a"), AWQ)
    tensor = source.tensors["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    assert (tensor.shape, tensor.dtype, tensor.kind) == ((40, 128), "F16", "AWQ 4")
    assert tensor.coding is not None
    for start, stop in [*windows(40), (7, 9), (8, 16), (9, 39)]:
        np.testing.assert_array_equal(tensor.read(start, stop), layer.numbers()[start:stop])
        codes = tensor.codes(start, stop)
        assert codes.biases is not None
        if stop > start:
            theirs = mx.dequantize(
                *(mx.array(part.data) for part in (codes.weight, codes.scales, codes.biases)), group_size=32, bits=4
            )
            np.testing.assert_array_equal(np.array(theirs), layer.numbers()[start:stop])


def test_what_mlx_lm_makes_of_it(tmp_path: Path) -> None:
    from mlx_lm.utils import _transform_awq_weights

    layer = Layer.random(64, 128, 4, 64)
    arrays = layer.awq("a")
    theirs, _ = _transform_awq_weights(
        {name: mx.array(data.view(np.uint32) if kind == "I32" else data) for name, (kind, data) in arrays.items()},
        {**AWQ, "group_size": 64},
    )
    ours = open_folder(tmp_path, arrays, {**AWQ, "group_size": 64}).tensors["a.weight"].codes(0, 64)
    np.testing.assert_array_equal(ours.weight.data, np.array(theirs["a.weight"]))
    np.testing.assert_array_equal(ours.scales.data, np.array(theirs["a.scales"]).astype(np.float32))


def test_one_group_for_all(tmp_path: Path) -> None:
    layer = Layer.random(16, 96, 4, 96)
    settings = {"quant_method": "awq", "w_bit": 4, "q_group_size": -1}
    tensor = open_folder(tmp_path, layer.awq("a"), settings).tensors["a.weight"]
    np.testing.assert_array_equal(tensor.read(3, 11), layer.numbers()[3:11])


def test_autoround_in_awqs_packing(tmp_path: Path) -> None:
    layer = Layer.random(16, 64, 4, 32)
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    tensor = open_folder(tmp_path, layer.awq("a"), settings).tensors["a.weight"]
    np.testing.assert_array_equal(tensor.read(0, 16), layer.numbers())


LAYER = Layer.random(16, 64, 4, 32).awq("a")


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (LAYER, {**AWQ, "version": "gemv"}, "layout 'gemv', which cannot be read"),
        (LAYER, {**AWQ, "bits": 3}, "AWQ weights of 3 bits"),
        ({**LAYER, "a.scales": ("F16", np.ones((2, 15), np.float16))}, AWQ, r"should have \[2, 16\]"),
        ({**LAYER, "a.qzeros": ("I32", np.ones((1, 2), np.int32))}, AWQ, r"should have \[2, 2\]"),
        ({**LAYER, "a.qweight": ("F16", np.ones((64, 2), np.float16))}, AWQ, "dtype F16"),
        ({**LAYER, "a.qweight": ("I32", np.ones(64, np.int32))}, AWQ, "1 dimensions instead of 2"),
        ({"a.qweight": LAYER["a.qweight"]}, AWQ, r"needs 'a\.scales' beside it"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, arrays: Any, settings: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path, arrays, settings)
