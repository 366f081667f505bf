"""GPTQ: every number of bits, both formats of zero points, and rows read as columns of what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from packed_layers import Layer
from weight_folders import open_folder, windows

from edger1.errors import FormatError

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_number_of_bits(tmp_path: Path, bits: int, act_order: bool) -> None:
    layer = Layer.random(64, 128, bits, 32, act_order=act_order)
    source = open_folder(tmp_path, layer.gptq("a"), {**GPTQ, "bits": bits, "desc_act": act_order})
    tensor = source.tensors["a.weight"]
    assert list(source.tensors) == ["a.weight"]
    assert (tensor.shape, tensor.dtype, tensor.kind) == ((64, 128), "F16", f"GPTQ {bits}")
    for start, stop in [*windows(64), (31, 33), (32, 40), (9, 64)]:
        np.testing.assert_array_equal(tensor.read(start, stop), layer.numbers()[start:stop])
        if not act_order:
            codes = tensor.codes(start, stop)
            assert codes.biases is not None
            parts = [mx.array(part.data.astype(np.float32)) for part in (codes.scales, codes.biases)]
            if stop > start:
                theirs = mx.dequantize(mx.array(codes.weight.data), *parts, group_size=32, bits=bits)
                np.testing.assert_array_equal(np.array(theirs), layer.numbers()[start:stop])
    assert (tensor.coding is None) == act_order


def test_zero_points_of_the_second_format_are_as_they_are(tmp_path: Path) -> None:
    layer = Layer.random(32, 64, 4, 32)
    layer.zeros[3, 1] = 0
    settings = {**GPTQ, "checkpoint_format": "gptq_v2"}
    tensor = open_folder(tmp_path, layer.gptq("a", offset=0), settings).tensors["a.weight"]
    np.testing.assert_array_equal(tensor.read(0, 32), layer.numbers())


def test_one_group_for_all_and_no_order(tmp_path: Path) -> None:
    layer = Layer.random(32, 96, 4, 96)
    arrays = {**layer.gptq("a", order=False), "a.bias": ("F16", np.zeros(32, np.float16))}
    source = open_folder(tmp_path, arrays, {**GPTQ, "group_size": -1})
    assert set(source.tensors) == {"a.weight", "a.bias"}
    np.testing.assert_array_equal(source.tensors["a.weight"].read(3, 17), layer.numbers()[3:17])


def test_bits_of_each_layer_follow_from_its_shapes(tmp_path: Path) -> None:
    few, many = Layer.random(32, 64, 2, 32), Layer.random(32, 64, 8, 32)
    tensors = open_folder(tmp_path, {**few.gptq("few"), **many.gptq("many")}, GPTQ).tensors
    np.testing.assert_array_equal(tensors["few.weight"].read(0, 32), few.numbers())
    np.testing.assert_array_equal(tensors["many.weight"].read(0, 32), many.numbers())


def test_settings_may_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    layer = Layer.random(32, 96, 4, 96)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": -1}', encoding="utf-8")
    tensor = open_folder(tmp_path, layer.gptq("a")).tensors["a.weight"]
    np.testing.assert_array_equal(tensor.read(0, 32), layer.numbers())


def test_codes_in_another_order_than_was_said_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where a file was announced and not there, the config's word had to do.
    from edger1.quant.formats.files import RawTensor

    layer = Layer.random(32, 128, 4, 32, act_order=True)
    monkeypatch.setattr(RawTensor, "present", property(lambda _: False))
    tensor = open_folder(tmp_path, layer.gptq("a"), {**GPTQ, "desc_act": False}).tensors["a.weight"]
    assert tensor.coding is not None
    assert tensor.coding.biases == "F32"
    with pytest.raises(FormatError, match="in another order than config.json says"):
        tensor.codes(0, 1)


def altered(name: str, part: tuple[str, np.ndarray] | None) -> dict[str, tuple[str, np.ndarray]]:
    arrays = dict(Layer.random(32, 64, 4, 32).gptq("a"))
    if part is None:
        del arrays[name]
    else:
        arrays[name] = part
    return arrays


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        (altered("a.scales", None), GPTQ, r"needs 'a\.scales' beside it"),
        (altered("a.qzeros", None), GPTQ, r"needs 'a\.qzeros' beside it"),
        (altered("a.qweight", None), GPTQ, "belongs to a quantized weight that is missing"),
        (altered("a.scales", ("F16", np.ones((3, 32), np.float16))), GPTQ, r"shape \[3, 32\].*should have \[2, 32\]"),
        (altered("a.scales", ("I32", np.ones((2, 32), np.int32))), GPTQ, "dtype I32"),
        (altered("a.qzeros", ("I32", np.ones((3, 4), np.int32))), GPTQ, r"shape \[3, 4\]"),
        (altered("a.qzeros", ("I32", np.ones((2, 5), np.int32))), GPTQ, "means 5 bits"),
        (altered("a.qzeros", ("F16", np.ones((2, 4), np.float16))), GPTQ, "dtype F16"),
        (altered("a.qweight", ("I32", np.ones((2, 4, 8), np.int32))), GPTQ, "3 dimensions instead of 2"),
        (altered("a.g_idx", ("I32", np.zeros(63, np.int32))), GPTQ, r"shape \[63\]"),
        (altered("a.g_idx", ("F32", np.zeros(64, np.float32))), GPTQ, "dtype F32"),
        (altered("a.bias", ("F16", np.zeros(2, np.float16))), {**GPTQ, "group_size": 0}, "'0' as its group_size"),
        (altered("a.bias", ("F16", np.zeros(2, np.float16))), {**GPTQ, "group_size": "x"}, "'x' as its group_size"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(tmp_path: Path, arrays: Any, settings: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        open_folder(tmp_path, arrays, settings)
