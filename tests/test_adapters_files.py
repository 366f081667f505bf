"""Adapters in mlx-lm's and in PEFT's layout: round trips, mlx-lm's own reading, damage and strangers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapting
import families
import mlx.core as mx
import numpy as np
import pytest
import streamed_models
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from edger1.errors import FormatError, UnknownModelError, UsageError
from edger1.train.adapters import files, peft
from edger1.train.adapters.wiring import AdapterSpec, attach


def _saved(folder: Path, family: str, spec: AdapterSpec, *, quantize: bool = True) -> Any:
    model = families.build(family, quantize=quantize)
    adapted = adapting.learnt(attach(model, spec))
    files.save(folder, adapted, "some/model", {"seed": 3})
    return adapted


def _same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", AdapterSpec(rank=4, rslora=True, targets=("attention",), layers=1)),
        ("qwen3_moe", AdapterSpec(rank=4, targets=("experts", "q_proj"))),
        ("qwen3_moe", AdapterSpec("dora", rank=4)),
        ("deepseek_v3", AdapterSpec(rank=4, targets=("attention", "lm_head"))),
    ],
)
def test_what_was_saved_is_loaded(tmp_path: Path, family: str, spec: AdapterSpec) -> None:
    adapted = _saved(tmp_path / "a", family, spec)
    saved = files.load(tmp_path / "a")
    assert saved.spec == spec
    assert (saved.of, saved.extra) == ("some/model", {"seed": 3})
    other = families.build(family, quantize=True)
    loaded = files.apply(other, tmp_path / "a")
    assert loaded.spec == spec
    assert _same(loaded.parameters(), adapted.parameters())
    assert mx.array_equal(other(adapting.IDS), adapted.model(adapting.IDS)).item()
    assert files.weight_bytes(tmp_path / "a") == adapted.nbytes


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", AdapterSpec(rank=4, rslora=True, layers=1)),
        ("llama", AdapterSpec("dora", rank=4, targets=("attention", "lm_head"))),
        ("qwen3_moe", AdapterSpec(rank=4)),
    ],
)
def test_mlx_lm_loads_what_is_saved_with_the_same_logits(tmp_path: Path, family: str, spec: AdapterSpec) -> None:
    adapted = _saved(tmp_path / "a", family, spec)
    assert files.beyond_mlx_lm(adapted) == []
    model, _ = load_model(streamed_models.write(tmp_path / "m", family))
    theirs = load_adapters(model, str(tmp_path / "a"))(adapting.IDS)
    ours = adapted.model(adapting.IDS)
    assert families.relative_error(ours, theirs) < 1e-5
    with adapted.off():
        assert families.relative_error(adapted.model(adapting.IDS), theirs) > 1e-2


def test_what_mlx_lm_cannot_load_is_said(tmp_path: Path) -> None:
    _saved(tmp_path / "a", "deepseek_v3", AdapterSpec(rank=4, targets=("attention",)))
    said = json.loads((tmp_path / "a" / files.CONFIG).read_text())["edger1"]["beyond_mlx_lm"]
    assert any("embed_q" in line for line in said)


def test_an_adapter_of_mlx_lm_is_loaded(tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    model = families.build("llama", quantize=True)
    linear_to_lora_layers(model, 1, parameters)
    weights = {
        f"{path}.{name}": mx.random.normal(module[name].shape, key=mx.random.key(7)) * 0.05
        for path, module in model.named_modules()
        for name in ("lora_a", "lora_b")
        if name in module
    }
    model.load_weights(list(weights.items()), strict=False)
    (tmp_path / files.CONFIG).write_text(json.dumps({"num_layers": 1, "lora_parameters": parameters}))
    mx.save_safetensors(str(tmp_path / files.WEIGHTS), weights)
    ours = families.build("llama", quantize=True)
    adapted = files.apply(ours, tmp_path)
    assert len(adapted.modules) == 7
    assert families.relative_error(ours(adapting.IDS), model(adapting.IDS)) < 1e-6


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", AdapterSpec(rank=4, scale=1.5, dropout=0.1)),
        ("llama", AdapterSpec("dora", rank=4, rslora=True, targets=("mlp", "v_proj"))),
        ("qwen3_moe", AdapterSpec(rank=4)),
        ("qwen3_moe", AdapterSpec("dora", rank=4)),
        ("mixtral", AdapterSpec(rank=4, targets=("experts",))),
        ("deepseek_v3", AdapterSpec(rank=3, rslora=True)),
    ],
)
def test_peft_and_back(tmp_path: Path, family: str, spec: AdapterSpec) -> None:
    adapted = adapting.learnt(attach(families.build(family), spec))
    peft.save(tmp_path, adapted, family, "some/model")
    tensors = mx.load(str(tmp_path / files.PEFT_WEIGHTS))
    assert all(name.startswith("base_model.model.") for name in tensors)
    other = families.build(family)
    loaded = files.apply(other, tmp_path)
    assert loaded.modules.keys() == adapted.modules.keys()
    assert families.relative_error(other(adapting.IDS), adapted.model(adapting.IDS)) < 1e-5
    with loaded.off():
        assert families.relative_error(other(adapting.IDS), adapted.model(adapting.IDS)) > 1e-2


def test_peft_computes_what_its_layout_says(tmp_path: Path) -> None:
    """The layout's own arithmetic, in NumPy: W + alpha / sqrt(r) B A of a matrix."""
    spec = AdapterSpec(rank=4, scale=1.5, rslora=True, targets=("q_proj",))
    adapted = adapting.learnt(attach(families.build("llama"), spec))
    tensors, config = peft.convert(adapted, "llama", "")
    layer = adapted.layers["model.layers.0.self_attn.q_proj"]
    a = np.array(tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    b = np.array(tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"])
    x = np.random.default_rng(0).normal(size=(3, a.shape[1])).astype(np.float32)
    expected = x @ (np.array(layer.linear.weight) + config["lora_alpha"] / config["r"] ** 0.5 * b @ a).T
    np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, rtol=1e-4, atol=1e-4)
    assert (config["use_rslora"], config["target_modules"]) == (True, ["q_proj"])


def test_peft_names_whole_paths_where_a_name_says_too_much() -> None:
    adapted = attach(families.build("llama"), AdapterSpec(rank=2, targets=("q_proj",), layers=1))
    assert peft.convert(adapted, "llama", "")[1]["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_families_without_known_names_are_not_written_for_peft() -> None:
    adapted = attach(families.build("gpt2"), AdapterSpec(rank=2))
    with pytest.raises(UsageError, match="gpt2"):
        peft.convert(adapted, "gpt2", "")


def test_an_adapter_of_another_model_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    _saved(tmp_path / "a", "qwen3_moe", AdapterSpec(rank=4))
    _saved(tmp_path / "b", "llama", AdapterSpec(rank=4, targets=("q_proj",)))
    model = families.build("llama", quantize=True)
    before = model(adapting.IDS)
    with pytest.raises(FormatError, match=r"another model \(some/model\): it is for .*switch_mlp.* 2 layers"):
        files.apply(model, tmp_path / "a")
    weights = mx.load(str(tmp_path / "b" / files.WEIGHTS))
    mx.save_safetensors(str(tmp_path / "b" / files.WEIGHTS), {n: w[:-1] for n, w in weights.items()})
    with pytest.raises(FormatError, match=r"another model.*q_proj.lora_a is \[127, 4\] where this model needs \[128,"):
        files.apply(model, tmp_path / "b")
    assert mx.array_equal(model(adapting.IDS), before).item()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (files.CONFIG, b"{"),
        (files.CONFIG, b"[]"),
        (files.CONFIG, b'{"lora_parameters": {"scale": 2.0}}'),
        (files.CONFIG, b'{"lora_parameters": {"rank": "x", "scale": 2.0}}'),
        (files.CONFIG, b'{"lora_parameters": {"rank": 4, "scale": 1e999}}'),
        (files.CONFIG, b'{"fine_tune_type": "full"}'),
        (files.CONFIG, b'{"fine_tune_type": "magic", "lora_parameters": {"rank": 4, "scale": 1}}'),
        (files.CONFIG, b'{"edger1": {"spec": {"rank": 4}}}'),
        (files.CONFIG, b'{"peft_type": "LOHA"}'),
        (files.CONFIG, b'{"peft_type": "LORA", "r": 4, "lora_alpha": 4}'),
        (files.WEIGHTS, b""),
        (files.WEIGHTS, b"\x10\x00\x00\x00\x00\x00\x00\x00{}"),
    ],
)
def test_damaged_folders_are_format_errors(tmp_path: Path, name: str, content: bytes) -> None:
    _saved(tmp_path / "a", "llama", AdapterSpec(rank=4, targets=("q_proj",)))
    (tmp_path / "a" / name).write_bytes(content)
    with pytest.raises(FormatError):
        files.load(tmp_path / "a")


def test_weights_that_are_no_numbers_or_cut_short_are_refused(tmp_path: Path) -> None:
    adapted = _saved(tmp_path / "a", "llama", AdapterSpec(rank=4, targets=("q_proj",)))
    path = tmp_path / "a" / files.WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(FormatError, match="truncated or damaged"):
        files.load(tmp_path / "a")
    weights = adapted.parameters()
    name = next(iter(weights))
    mx.save_safetensors(str(path), weights | {name: weights[name] * float("nan")})
    with pytest.raises(FormatError, match="not finite"):
        files.load(tmp_path / "a")
    with pytest.raises(UnknownModelError, match="does not exist"):
        files.load(tmp_path / "nothing")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.train import folder_writer

    adapted = _saved(tmp_path / "a", "llama", AdapterSpec(rank=4, targets=("q_proj",)))
    before = (tmp_path / "a" / files.WEIGHTS).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_writer, "write_tensors", full)
    adapting.learnt(adapted, seed=5)
    with pytest.raises(folder_writer.SaveError, match="no space left"):
        files.save(tmp_path / "a", adapted, "some/model")
    assert (tmp_path / "a" / files.WEIGHTS).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
