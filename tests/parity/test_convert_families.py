"""Converted models against transformers: families and formats as their makers publish them, to the same logits.

Tiny random models, saved by transformers itself; the quantized formats are written over that by their definitions, and
transformers reads them with its own code. Both compute in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from edger1.quant.converting import Report, convert
from edger1.quant.opening import open_source
from edger1.quant.recipes import find, uniform
from edger1.quant.traced_model import model_of

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")

COMMON: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.07,
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 128}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 64},
    "qwen3_moe": {**MIXTURE, "head_dim": 64, "norm_topk_prob": True, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 96, "q_lora_rank": 128,
        "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64, "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 16,
        "intermediate_size": 128, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        # Not YaRN: mlx-lm rounds its bounds where gpt-oss does not.
        "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
    },
}  # fmt: skip
AT_8_BITS = 0.08
"""Of random weights, which turn half a per cent of rounding into several over three layers."""
TOKENS = np.random.default_rng(0).integers(3, 320, 48)


def publish(folder: Path, family: str) -> Path:
    """A model of the family with random weights, as transformers publishes it in bf16."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **COMMON | FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "bias" in name or "sinks" in name:
                value.normal_(0, 0.1)
            elif value.ndim == 1:
                value.normal_(1, 0.1)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.normal_(0, 0.05)
    model.save_pretrained(folder)
    return folder


def theirs(folder: Path, **options: Any) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).float().eval()
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(TOKENS[None])).logits[0].float().numpy()
    return found


def converted(source: Path, recipe: str | int) -> tuple[np.ndarray, Report, dict[str, Any]]:
    destination = source.with_name(f"{source.name}-{recipe}")
    opened = open_source(source)
    chosen = uniform(recipe, 32) if isinstance(recipe, int) else find(recipe)
    report = convert(opened, model_of(opened), destination, chosen)
    from mlx_lm.utils import load_model

    model, config = load_model(destination)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(TOKENS[None]))[0]), report, config


def error(found: np.ndarray, expected: np.ndarray, q: float = 1.0) -> float:
    """The relative error of a token's logits, at quantile `q` of the tokens: routers may decide near ties otherwise."""
    size = np.linalg.norm(expected - expected.mean(1, keepdims=True), axis=1)
    return float(np.quantile(np.linalg.norm(found - expected, axis=1) / size, q))


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantized_and_at_8_bits(tmp_path: Path, family: str) -> None:
    folder = publish(tmp_path / family, family)
    expected = theirs(folder)
    found, _, _ = converted(folder, "keep")
    assert error(found, expected) < 1e-3
    found, report, config = converted(folder, 8)
    assert config["quantization"]["bits"] == 8
    assert report.bits_per_weight < 9.5
    assert error(found, expected, 0.5) < AT_8_BITS


def rewrite(folder: Path, change: Callable[[str, Any], dict[str, Any]], quantization: dict[str, Any]) -> Path:
    """Replace each tensor by what `change` makes of it."""
    for path in folder.glob("*.safetensors"):
        changed: dict[str, Any] = {}
        for name, value in st.load_file(path).items():
            changed |= change(name, value)
        st.save_file({name: value.contiguous() for name, value in changed.items()}, path, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def is_linear(name: str, value: Any) -> bool:
    kept = ("embed_tokens", "lm_head", "mlp.gate.weight", "norm")
    return name.endswith(".weight") and value.ndim == 2 and not any(part in name for part in kept)


def fp8_blocks(name: str, value: Any) -> dict[str, Any]:
    if not is_linear(name, value):
        return {name: value}
    rows, columns = (-(-size // 128) for size in value.shape)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: value.shape[0], : value.shape[1]] = value.float()
    blocks = padded.reshape(rows, 128, columns, 128)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[: value.shape[0], : value.shape[1]]
    return {name: codes.to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "llama"])
def test_fp8_in_blocks_of_128(tmp_path: Path, family: str) -> None:
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = rewrite(publish(tmp_path / family, family), fp8_blocks, settings)
    expected = theirs(folder, quantization_config=transformers.FineGrainedFP8Config(dequantize=True))
    found, report, _ = converted(folder, "keep")
    assert any("F8_E4M3 128x128" in made.kind for made in report.tensors)
    assert error(found, expected, 0.5) < 0.01
    found, _, _ = converted(folder, 8)
    assert error(found, expected, 0.5) < AT_8_BITS


def fp8_channels(name: str, value: Any) -> dict[str, Any]:
    if not is_linear(name, value):
        return {name: value}
    scale = (value.float().abs().amax(1, keepdim=True) / 448).to(torch.bfloat16)
    return {name: (value.float() / scale.float()).to(torch.float8_e4m3fn), f"{name}_scale": scale}


def compressed(weights: dict[str, Any], form: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"dynamic": False, **weights}, "format": form}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"],
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_fp8_by_channel(tmp_path: Path, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    folder = rewrite(publish(tmp_path / family, family), fp8_channels, compressed(weights, "float-quantized"))
    expected = theirs(folder, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False))
    found, report, _ = converted(folder, "keep")
    assert any("F8_E4M3 per channel" in made.kind for made in report.tensors)
    assert error(found, expected) < 0.01


def int4_groups(name: str, value: Any) -> dict[str, Any]:
    if not is_linear(name, value):
        return {name: value}
    rows, columns = value.shape
    grouped = value.float().reshape(rows, columns // 32, 32)
    scale = (grouped.abs().amax(2) / 7.5).to(torch.bfloat16)
    codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7).to(torch.int64).reshape(rows, columns) + 8
    words = (codes.reshape(rows, columns // 8, 8) << torch.arange(0, 32, 4)).sum(2)
    path = name.removesuffix("weight")
    return {
        f"{path}weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32),
        f"{path}weight_scale": scale, f"{path}weight_shape": torch.tensor(value.shape),
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_int4_is_carried(tmp_path: Path, family: str) -> None:
    pytest.importorskip("compressed_tensors")
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    folder = rewrite(publish(tmp_path / family, family), int4_groups, compressed(weights, "pack-quantized"))
    expected = theirs(folder, quantization_config=transformers.CompressedTensorsConfig(run_compressed=False))
    found, report, _ = converted(folder, "keep")
    assert sum(made.carried for made in report.tensors if "int4" in made.kind) == 7 * 3
    # transformers rounds what it unpacks to bf16.
    assert error(found, expected) < 0.02


def mxfp4_experts(name: str, value: Any) -> dict[str, Any]:
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: value}
    experts, inputs, outputs = value.shape
    generator = torch.Generator().manual_seed(len(name))
    shape = (experts, outputs, inputs // 32)
    return {
        f"{name}_blocks": torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator),
        f"{name}_scales": torch.randint(120, 124, shape, dtype=torch.uint8, generator=generator),
    }


def test_mxfp4_of_gpt_oss_is_carried(tmp_path: Path) -> None:
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    folder = rewrite(publish(tmp_path / "gpt_oss", "gpt_oss"), mxfp4_experts, settings)
    expected = theirs(folder, quantization_config=transformers.Mxfp4Config(dequantize=True))
    found, report, _ = converted(folder, "keep")
    assert sum(made.carried for made in report.tensors) == 3 * 3
    assert error(found, expected, 0.5) < 1e-2
    found, _, _ = converted(folder, 8)
    assert error(found, expected, 0.5) < AT_8_BITS
