"""Sources in the layouts that labs publish, run layer by layer, against the whole model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import numpy as np
import pytest
from hub_layouts import hub_layout
from mlx.utils import tree_flatten
from tiny import write_tokenizer

from edger1 import measuring, source_layers, worker
from edger1.errors import FormatError
from edger1.layers import ModelLayers
from edger1.quant.opening import open_source
from edger1.source_layers import SourceLayers, open_any

# Plain, tied, experts of their own, latent attention in two stacks of heads, a head that is found not to be there.
FAMILIES = ["llama", "qwen2", "qwen3_moe", "deepseek_v3", "gemma3_text"]


def write(folder: Path, family: str, **settings: Any) -> tuple[Path, Any]:
    """Write a tiny model as its lab would; returns the folder and the model."""
    model = families.build(family)
    arrays = dict(tree_flatten(model.parameters()))
    if family == "gemma3_text":
        del arrays["lm_head.weight"]
        model.tie_word_embeddings = True
        model.pop("lm_head")
    folder.mkdir()
    published = {name: array.astype(mx.float32) for name, array in hub_layout(family, arrays).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), published)
    config = {"torch_dtype": "float32", **families.tiny_config(family), **settings}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder, model


def logits(layers: ModelLayers, tokens: np.ndarray) -> np.ndarray:
    passing = layers.begin(tokens)
    for layer in range(layers.layers):
        layers.advance(layer, [passing])
    return layers.logits(passing)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder, model = write(tmp_path / "m", family)
    tokens = np.array([families.PROMPT, families.PROMPT[::-1]])
    with contextlib.closing(SourceLayers(open_source(folder))) as layers:
        assert families.relative_error(mx.array(logits(layers, tokens)), model(mx.array(tokens))) < 1e-4
        assert layers.parameters == sum(a.size for _, a in tree_flatten(model.parameters()))


def test_what_another_program_has_quantized_is_read_as_a_source(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "m", "llama")
    with contextlib.closing(open_any(folder)) as layers:
        assert type(layers) is ModelLayers
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with contextlib.closing(open_any(folder)) as layers:
        assert type(layers) is SourceLayers


def test_a_source_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    folder, _ = write(tmp_path / "m", "llama", quantization_config={"quant_method": "fp8"})
    weights = dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]
    del weights["model.norm.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(FormatError, match="model.norm.weight"):
        open_any(folder)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(FormatError):
        open_any(file)


def test_a_gguf_file_is_measured_as_it_is(tmp_path: Path) -> None:
    from recipes.nano import gguf_f16

    source = Path(__file__).parent.parent / "recipes" / "nano" / "weights" / "nano-dense"
    gguf_f16.write(source, tmp_path / "dense.gguf")
    text = "Use 22, 23 and 11 once each to get 56."
    found = worker.call(lambda: measuring.evaluate(tmp_path / "dense.gguf", source, text))
    # Its F16 holds all of the bf16 weights but for the smallest.
    assert found.mean_divergence < 1e-6
    assert found.top1_agreement == 1
    assert found.model.bits_per_weight == pytest.approx(16, rel=0.01)
    assert found.model.name == "dense"


def test_a_gguf_file_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from edger1.cli import app

    asked: list[Path] = []

    def evaluate(model: Path, source: Path, *_: Any, **__: Any) -> Any:
        asked.extend([model, source])
        raise FormatError("stop")

    monkeypatch.setattr(measuring, "evaluate", evaluate)
    folder, _ = write(tmp_path / "m", "llama")
    (tmp_path / "x.gguf").write_bytes(b"")
    (tmp_path / "text").write_text("words")
    command = ["eval", str(tmp_path / "x.gguf"), "--against", str(folder), "--text", str(tmp_path / "text")]
    CliRunner().invoke(app, command)
    assert asked == [tmp_path / "x.gguf", folder]


def test_modules_that_are_read_by_rows_are_never_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = write(tmp_path / "m", "llama")
    source = open_source(folder)
    read: list[str] = []
    kinds = {type(tensor) for tensor in source.tensors.values()}
    for kind in kinds:
        original = kind.read

        def spy(self: Any, start: int, stop: int, original: Any = original) -> np.ndarray:
            read.append(self.name)
            return original(self, start, stop)

        monkeypatch.setattr(kind, "read", spy)
    with contextlib.closing(source_layers.SourceLayers(source)):
        assert read
        assert all("norm" in name for name in read)
