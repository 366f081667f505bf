"""Adapters fused into weights, and models written for mlx-lm, transformers, PEFT and llama.cpp."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import adapting
import families
import hub_layouts
import mlx.core as mx
import mlx.nn as nn
import pytest
import streamed_models
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from tiny import TINY_CONFIG, write_tiny_model, write_tokenizer
from typer.testing import CliRunner

from edger1.cli import app
from edger1.errors import UsageError
from edger1.quant.convert import convert_gguf
from edger1.train.adapters import export, files, peft
from edger1.train.adapters.fuse import dequantize_model, fuse
from edger1.train.adapters.gguf_file import write_gguf
from edger1.train.adapters.wiring import AdapterSpec, attach
from edger1.train.folder_writer import SaveError

SPECS = [AdapterSpec(rank=4, rslora=True), AdapterSpec("dora", rank=4)]


def _logits(folder: Path) -> mx.array:
    model, _ = load_model(folder)
    return model(adapting.IDS)


def _saved(folder: Path, model: Path, spec: AdapterSpec, by: float = 0.05) -> mx.array:
    """Save an adapter over a model folder and return what the model answers with it."""
    live, _ = load_model(model)
    adapted = adapting.learnt(attach(live, spec), by=by)
    files.save(folder, adapted, model)
    return live(adapting.IDS)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_fused_equals_the_adapter(family: str, spec: AdapterSpec) -> None:
    for quantize in (False, True):
        model = families.build(family, quantize=quantize)
        adapted = adapting.learnt(attach(model, spec))
        with adapted.off():
            bare = model(adapting.IDS)
        expected = model(adapting.IDS)
        fused = fuse(adapted, dequantize=quantize)
        assert not any("lora_a" in name for name, _ in tree_flatten(model.parameters()))
        assert families.relative_error(model(adapting.IDS), expected) < 1e-4 < families.relative_error(bare, expected)
        assert (fused.modules, fused.requantized) == (len(adapted.modules), 0)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_fusing_into_quantized_weights_says_what_rounding_takes(family: str) -> None:
    losses, errors = [], []
    for by in (0.05, 0.3):
        model = families.build(family, quantize=True)
        adapted = adapting.learnt(attach(model, AdapterSpec(rank=4)), by=by)
        expected = model(adapting.IDS)
        kinds = {name: value.dtype for name, value in tree_flatten(model.parameters()) if ".lora" not in name}
        fused = fuse(adapted)
        after = {name: value.dtype for name, value in tree_flatten(model.parameters())}
        assert after == {name.replace(".linear.", "."): kind for name, kind in kinds.items()}
        losses.append(fused.loss)
        errors.append(families.relative_error(model(adapting.IDS), expected))
        assert fused.requantized == fused.modules
        assert f"{fused.loss:.0%}" in fused.describe()
        assert fused.worst >= fused.loss > 0
    # What is large against the steps of the codes survives better.
    assert losses[1] < losses[0]
    assert errors[0] > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "rwkv7"])
def test_a_dequantized_model_has_nothing_quantized_left_and_the_same_logits(family: str) -> None:
    model = families.build(family, quantize=True)
    before = model(adapting.IDS)
    assert dequantize_model(model) > 0
    assert not [path for path, module in model.named_modules() if "scales" in module]
    assert families.relative_error(model(adapting.IDS), before) < 1e-4


def test_the_fuse_command_writes_a_model_that_loads(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    expected = _saved(tmp_path / "a", folder, AdapterSpec(rank=4))
    command = ["fuse", str(folder), "--adapter", str(tmp_path / "a"), "--output", str(tmp_path / "f")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert re.search(r"fused into 14 modules, 14 of them quantized again: .* \d+% of what", done.output)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["quantization"] == {"group_size": 32, "bits": 4}
    assert (tmp_path / "f" / "tokenizer.json").exists()
    plain = tmp_path / "plain"
    CliRunner().invoke(app, [*command[:-1], str(plain), "--dequantize"], catch_exceptions=False)
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    assert families.relative_error(_logits(plain), expected) < 1e-4
    assert families.relative_error(_logits(tmp_path / "f"), expected) > 1e-4
    again = CliRunner().invoke(app, command)
    assert isinstance(again.exception, UsageError)
    assert "exists already" in str(again.exception)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "qwen2"])
def test_hf_folders_hold_what_mlx_lm_reads_as_the_fused_model(tmp_path: Path, family: str) -> None:
    folder = streamed_models.write(tmp_path / "m", family)
    write_tokenizer(folder)
    expected = _saved(tmp_path / "a", folder, AdapterSpec(rank=4))
    export.write_hf(tmp_path / "hf", folder, tmp_path / "a")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert "quantization" not in config
    assert config["architectures"] == [export.CLASSES[family]]
    names = set(mx.load(str(tmp_path / "hf" / "model.safetensors")))
    assert not any("switch_mlp" in name or "embed_q" in name for name in names)
    assert families.relative_error(_logits(tmp_path / "hf"), expected) < 1e-4


@pytest.mark.parametrize("family", [f for f in peft.ROW_NAMED if f in families.families()])
def test_names_for_transformers_are_those_of_published_checkpoints(family: str) -> None:
    model = families.build(family)
    published = hub_layouts.hub_layout(family, dict(tree_flatten(model.parameters())))
    ours = export.hub_weights(model, family)
    # What mlx-lm drops: tables that old checkpoints carry, and layers that predict further tokens.
    beside = re.compile(r"rotary_emb\.inv_freq|mtp_layers|layers\.2\.(eh_proj|enorm|hnorm|shared_head|embed_tokens)")
    assert {name for name in published if not beside.search(name)} == set(ours)
    assert all(mx.array_equal(ours[name], published[name]).item() for name in ours)


def _write(folder: Path, family: str, **changes: Any) -> Path:
    """Write a tiny model with a tokenizer that has merges, as all real ones have."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {**TINY_CONFIG, "model_type": family, "vocab_size": 270, **changes}
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    nn.quantize(model, group_size=32, bits=4)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"us": 256, "er": 257, "user": 258, "Ġx": 259}
    words["added_tokens"] = [{**token, "id": token["id"] + 4} for token in words["added_tokens"]]
    words["model"]["merges"] = [["u", "s"], ["e", "r"], ["us", "er"], ["Ġ", "x"]]
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_gguf_files_hold_the_fused_model_and_its_tokenizer(tmp_path: Path, family: str, tied: bool) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {**llama3, "original_max_position_embeddings": 8192} if family == "llama" and not tied else None
    folder = _write(tmp_path / "m", family, tie_word_embeddings=tied, rope_scaling=scaling, head_dim=16)
    expected = _saved(tmp_path / "a", folder, AdapterSpec(rank=4))
    write_gguf(tmp_path / "m.gguf", folder, tmp_path / "a")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    # Weights become F16 on the way.
    assert families.relative_error(_logits(tmp_path / "back"), expected) < 5e-3
    from mlx_lm.utils import load_tokenizer

    ours, theirs = load_tokenizer(tmp_path / "back"), load_tokenizer(folder)
    text = "<|im_start|>user\nIt's 2026, née <think>\n\n  x"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.chat_template == theirs.chat_template


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / "m", "gpt2")
    write_tokenizer(folder)
    with pytest.raises(UsageError, match="modules of a gpt2"):
        export.write_hf(tmp_path / "hf", folder, None)
    with pytest.raises(UsageError, match="A gpt2 cannot be written as GGUF"):
        write_gguf(tmp_path / "m.gguf", folder, None)
    tiny = write_tiny_model(tmp_path / "t", rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(UsageError, match="'yarn'"):
        write_gguf(tmp_path / "m.gguf", tiny, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "t"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "m")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_tensors", full)
    with pytest.raises(SaveError, match="no space left"):
        export.write_mlx(tmp_path / "f", folder, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_an_adapter_alone_goes_to_peft(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    expected = _saved(tmp_path / "a", folder, AdapterSpec(rank=4))
    command = ["export", str(folder), "--adapter", str(tmp_path / "a"), "--to", "hf", "--adapter-only", "--output"]
    CliRunner().invoke(app, [*command, str(tmp_path / "p")], catch_exceptions=False)
    config = json.loads((tmp_path / "p" / files.CONFIG).read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("LORA", str(folder))
    model, _ = load_model(folder)
    files.apply(model, tmp_path / "p")
    assert families.relative_error(model(adapting.IDS), expected) < 1e-5
