"""What `inspect` says about model folders, and how it refuses those that are none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import LIMIT_S
from safetensors.numpy import save_file

from edger1.errors import FormatError, UnknownModelError
from edger1.folder import inspect

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "max_position_embeddings": 40960,
    "quantization": {"group_size": 32, "bits": 4, "mode": "affine", "head": {"group_size": 32, "bits": 8}},
}


def quantized(rows: int, columns: int, bits: int, path: str) -> dict[str, np.ndarray]:
    return {
        f"{path}.weight": np.zeros((rows, columns * bits // 32), np.uint32),
        f"{path}.scales": np.zeros((rows, columns // 32), np.float16),
        f"{path}.biases": np.zeros((rows, columns // 32), np.float16),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    first = quantized(8, 64, 4, "body") | {"norm.weight": np.zeros(64, np.float32)}
    save_file(first, folder / "model-00001-of-00002.safetensors")
    save_file(quantized(4, 64, 8, "head"), folder / "model-00002-of-00002.safetensors")
    weight_map = dict.fromkeys(first, "model-00001-of-00002.safetensors") | {
        "head.weight": "model-00002-of-00002.safetensors"
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    return folder


def test_describes_a_folder(folder: Path) -> None:
    found = inspect(folder)
    assert (found.model_type, found.architecture) == ("qwen3", "Qwen3ForCausalLM")
    assert found.context_length == 40960
    assert found.quantization == CONFIG["quantization"]
    assert found.parameters == 8 * 64 + 64 + 4 * 64
    assert [file.name[:11] for file in found.weight_files] == ["model-00001", "model-00002"]
    assert found.total_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert found.has_chat_template


def test_says_what_is_not_there(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"n_positions": 128}}))
    (folder / "tokenizer_config.json").unlink()
    found = inspect(folder)
    assert (found.architecture, found.quantization, found.has_chat_template) == (None, None, False)
    assert found.context_length == 128
    (folder / "chat_template.jinja").write_text("x")
    assert inspect(folder).has_chat_template


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_no_such_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnknownModelError, match=r"expected a folder with config\.json"):
        inspect(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "model_type"),
        (b'{"model_type": 3}', "model_type"),
    ],
    ids=["missing", "cut", "no UTF-8", "deep", "list", "empty", "number"],
)
def test_a_damaged_config(folder: Path, content: bytes | None, message: str) -> None:
    config = folder / "config.json"
    config.unlink() if content is None else config.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        inspect(folder)


def test_a_gguf_folder_is_told_how_to_convert(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "m.gguf").touch()
    with pytest.raises(FormatError, match="edger1 pull"):
        inspect(folder)


def test_no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(FormatError, match="no weights"):
        inspect(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FormatError, match="pickles only, which can run code"):
        inspect(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FormatError, match="model-00002-of-00002"):
        inspect(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "..", "a\\b", "", "a\0b"])
def test_an_index_that_points_outside(folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError, match="not a plain file name"):
        inspect(folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"])
def test_a_damaged_index(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(FormatError, match="index"):
        inspect(folder)


def test_a_truncated_shard(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        inspect(folder)


def test_a_hostile_quantization_setting_harms_nothing(folder: Path) -> None:
    for bits in (0, -4, 1 << 80, "4", None, [4]):
        (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization": {"bits": bits}}))
        assert inspect(folder).parameters > 0


def test_needs_no_mlx_and_next_to_no_time(folder: Path) -> None:
    code = (
        "import sys, pathlib; from edger1.folder import inspect; inspect(pathlib.Path(sys.argv[1])); "
        "assert not {'mlx', 'numpy', 'tokenizers', 'transformers'} & sys.modules.keys(), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, folder], check=True, timeout=LIMIT_S)


@pytest.mark.model
def test_a_real_folder_takes_milliseconds(smollm2: Path) -> None:
    # Processor time, and the best of several: others may keep the machine busy.
    costs = []
    for _ in range(5):
        start = time.process_time()
        found = inspect(smollm2)
        costs.append(time.process_time() - start)
    assert min(costs) < 0.05
    assert found.parameters == 134_515_008
    assert found.context_length == 8192
