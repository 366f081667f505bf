"""From a source's tensors to the converter's plan: what each row is made of, and what becomes of MTP layers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edger1 import mlx_runtime

mlx_runtime.prepare()

import mlx.core as mx  # noqa: E402

from edger1.quant import planning, recipes  # noqa: E402
from edger1.quant.converting import Report, Settings, convert  # noqa: E402
from edger1.quant.opening import open_source  # noqa: E402
from edger1.quant.traced_model import model_of  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "recipes" / "nano" / "weights"
ASSET = ROOT / "edger1" / "assets" / "nano-moe"


def converted(folder: Path, destination: Path, recipe: recipes.Recipe) -> Report:
    source = open_source(folder)
    try:
        return convert(source, model_of(source), destination, recipe, Settings(threads=2, shard_bytes=4 << 20))
    finally:
        source.close()


def arrays(folder: Path, pattern: str) -> dict[str, mx.array]:
    return {name: value for path in folder.glob(pattern) for name, value in mx.load(str(path)).items()}


def test_a_stack_of_experts_needs_one_expert_a_row() -> None:
    source = open_source(WEIGHTS / "nano-moe")
    model = model_of(source)
    (stack,) = [target for target in model.targets if target.name == "model.layers.3.mlp.switch_mlp.up_proj.weight"]
    assert stack.sources(5, 7) == tuple(f"model.layers.3.mlp.experts.{e}.up_proj.weight" for e in (5, 6))
    assert len(stack.sources(0, 32)) == 32
    (joined,) = [target for target in model.targets if target.name == "model.layers.3.self_attn.embed_q.weight"]
    assert joined.sources(1, 2) == ("model.layers.3.self_attn.kv_b_proj.weight",)


def test_nano_moe_becomes_what_training_wrote_its_mtp_layer_among_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "WINDOW_BYTES", 1 << 16)
    report = converted(WEIGHTS / "nano-moe", tmp_path / "model", recipes.uniform(4, 128))
    for pattern in ("model*.safetensors", "mtp.safetensors"):
        found, expected = arrays(report.folder, pattern), arrays(ASSET, pattern)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    config, expected_config = (json.loads((f / "config.json").read_text()) for f in (report.folder, ASSET))
    assert config == expected_config
    assert any(made.name == "model.layers.6.eh_proj.weight" for made in report.ahead)
    assert report.dropped == ()
    assert (report.folder / "tokenizer.json").is_file()


def test_a_quantized_folder_is_carried_over_as_it_is(tmp_path: Path) -> None:
    report = converted(ASSET, tmp_path / "model", recipes.find("keep"))
    for pattern in ("model*.safetensors", "mtp.safetensors"):
        found, expected = arrays(report.folder, pattern), arrays(ASSET, pattern)
        assert found.keys() == expected.keys()
        assert all(mx.array_equal(found[name], expected[name]) for name in expected)
    quantized = [made for made in report.tensors if "kept," in made.how]
    assert quantized
    assert all(made.carried for made in quantized)


def test_fewer_bits_requantize_and_mlx_lm_loads_it(tmp_path: Path) -> None:
    import mlx_lm

    report = converted(ASSET, tmp_path / "model", recipes.find("r1-small"))
    assert not any(made.carried for made in report.tensors if "switch_mlp" in made.name)
    model, tokenizer = mlx_lm.load(str(report.folder))
    assert model.layers[1].mlp.switch_mlp.up_proj.bits == 2
    assert model.layers[1].mlp.switch_mlp.down_proj.bits == 3
    logits = model(mx.array([tokenizer.encode("1 + 1")]))
    assert np.isfinite(np.array(logits.astype(mx.float32))).all()
