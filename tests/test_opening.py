"""Opening a model: every folder gets one face, and one that cannot be trusted gets one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packed_layers import Layer
from tiny import write_tiny_model
from weight_folders import CONFIG, Arrays, file_bytes, open_folder, write_folder

from edger1.errors import FormatError, UnknownModelError
from edger1.quant.formats.safetensors import parse_header
from edger1.quant.opening import open_source

PLAIN: Arrays = {"a.weight": ("F32", np.ones((4, 4), np.float32)), "b.bias": ("F16", np.ones(4, np.float16))}


def test_a_source_says_what_the_converter_needs(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "generation_config.json").write_text("{}", encoding="utf-8")
    source = open_folder(tmp_path, PLAIN)
    assert source.name == tmp_path.name
    assert source.config == CONFIG
    assert set(source.tensors) == PLAIN.keys()
    assert [path.name for path in source.companions] == ["generation_config.json", "tokenizer.json"]
    assert all(tensor.name == name for name, tensor in source.tensors.items())
    source.close()


def test_a_folder_of_mlx_lm(tmp_path: Path) -> None:
    import mlx.core as mx

    folder = write_tiny_model(tmp_path / "m")
    tensors = open_source(folder).tensors
    weights = mx.load(str(folder / "model.safetensors"))
    path = "model.layers.0.self_attn.q_proj"
    expected = mx.dequantize(*(weights[f"{path}.{part}"] for part in ("weight", "scales", "biases")), 32, 4)
    np.testing.assert_array_equal(tensors[f"{path}.weight"].read(0, 64), np.array(expected))
    assert not any(name.endswith((".scales", ".biases")) for name in tensors)


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_config_comes_without_the_sources_quantization(tmp_path: Path, key: str, nested: bool) -> None:
    layer = Layer.random(16, 64, 4, 32)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    config: dict[str, Any] = {"text_config": {"x": 1, key: settings}} if nested else {key: settings}
    source = open_source(write_folder(tmp_path, layer.gptq("a"), **config))
    assert "quantiz" not in json.dumps(source.config)
    np.testing.assert_array_equal(source.tensors["a.weight"].read(0, 16), layer.numbers())


def test_mtp_weights_beside_the_model_are_part_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "mtp.safetensors").write_bytes(file_bytes({"model.layers.1.eh_proj.weight": PLAIN["a.weight"]}))
    assert set(open_folder(tmp_path, PLAIN).tensors) == {*PLAIN, "model.layers.1.eh_proj.weight"}


def test_the_fingerprint_changes_with_weights_and_config_alone(tmp_path: Path) -> None:
    def fingerprint() -> str:
        return open_source(tmp_path).fingerprint

    open_folder(tmp_path, PLAIN)
    first = fingerprint()
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert fingerprint() == first
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "x": 1}), encoding="utf-8")
    second = fingerprint()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    os.utime(weights, ns=(5, 5))
    assert len({first, second, fingerprint()}) == 3


def test_weights_that_are_coming_are_read_when_they_have_come(tmp_path: Path) -> None:
    arrays = Layer.random(16, 64, 4, 32).gptq("a")
    folder = write_folder(tmp_path, arrays, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    content = (folder / "model.safetensors").read_bytes()
    header = parse_header(
        folder / "model.safetensors", content[8 : 8 + int.from_bytes(content[:8], "little")], len(content)
    )
    (folder / "model.safetensors").unlink()
    source = open_source(folder, coming=[header])
    tensor = source.tensors["a.weight"]
    # Decided without the file, and so that it holds whatever the file will have.
    assert tensor.coding is not None
    assert tensor.coding.biases == "F32"
    (folder / "model.safetensors").write_bytes(content)
    again = open_source(folder, coming=[header])
    assert again.fingerprint == source.fingerprint
    assert again.tensors["a.weight"].coding == tensor.coding
    assert tensor.codes(0, 16).biases is not None


def test_opening_and_reading_write_nothing(tmp_path: Path) -> None:
    def state() -> dict[str, tuple[int, int, int]]:
        found = {path.name: path.stat() for path in tmp_path.iterdir()}
        return {name: (about.st_size, about.st_mtime_ns, about.st_mode) for name, about in found.items()}

    write_folder(tmp_path, PLAIN)
    tmp_path.chmod(0o555)
    before = state()
    for tensor in open_source(tmp_path).tensors.values():
        tensor.read(0, tensor.shape[0])
    tmp_path.chmod(0o755)
    assert state() == before


def test_what_is_not_there_and_what_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="does not exist"):
        open_source(tmp_path / "none")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(FormatError, match="is a file; expected a folder"):
        open_source(tmp_path / "file")
    with pytest.raises(FormatError, match="has no config.json"):
        open_source(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    with pytest.raises(FormatError, match=r"2 GGUF files; name the one that is meant, of a\.gguf, b\.gguf"):
        open_source(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "aqlm", "hqq", "torchao", "nvfp4", 7])
def test_a_method_that_is_not_known_is_named(tmp_path: Path, method: Any) -> None:
    with pytest.raises(FormatError, match=f"is quantized by '{method}', which cannot be read"):
        open_folder(tmp_path, PLAIN, {"quant_method": method})


@pytest.mark.parametrize("value", [[], "fp8", 3])
def test_quantization_that_is_no_object_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(FormatError, match="its quantization_config is no JSON object"):
        open_folder(tmp_path, PLAIN, value)


def test_files_without_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="hold no tensors"):
        open_folder(tmp_path, {})


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    weights = write_folder(tmp_path, PLAIN) / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"model\.safetensors: tensor 'b\.bias' lies at bytes"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.qzeros", "a.scales", "a.weight_scale", "a.weight_packed", "a.weight_zero_point", "a.weight_scale_inv"]
)
def test_a_part_without_its_weight_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match=f"'{name}' (belongs to a quantized weight|needs)"):
        open_folder(tmp_path, {name: ("F32", np.ones((2, 2), np.float32))})
