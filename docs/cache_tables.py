"""Writes the table of bytes a token into docs/caches.md: python docs/cache_tables.py [--check].

The shapes are those of published models' config.json. mlx-lm builds each of them without a weight (of experts two, on
which no cache depends), and `edger1.kv_layout` reads off what would be cached.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from marked_tables import renewed, write_or_check

from edger1 import mlx_runtime
from edger1.memory import KVLayout

TARGET = Path(__file__).with_name("caches.md")

_YARN = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}
_LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 1024,
        "vocab_size": 1000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    } | more


_EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 256, "norm_topk_prob": True}
_DEEPSEEK = {
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 256,
}

MODELS: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("deepseek_v3", "DeepSeek-V3, R1", _shape(7168, 61, 128, 128, 128, q_lora_rank=1536, **_LATENT, **_DEEPSEEK)),
    ("deepseek_v2", "DeepSeek-V2", _shape(5120, 60, 128, 128, 128, q_lora_rank=1536, rope_scaling=_YARN, **_LATENT)),
    ("deepseek_v2", "DeepSeek-V2-Lite", _shape(2048, 27, 16, 16, 128, q_lora_rank=None, rope_scaling=_YARN, **_LATENT)),
    ("llama", "SmolLM2-135M", _shape(576, 30, 9, 3, 64)),
    ("llama", "Llama-3.1-8B", _shape(4096, 32, 32, 8, 128)),
    ("qwen2", "Qwen2.5-7B, R1-Distill-Qwen-7B", _shape(3584, 28, 28, 4, 128)),
    ("qwen3", "Qwen3-8B", _shape(4096, 36, 32, 8, 128)),
    (
        "qwen3_moe",
        "Qwen3-30B-A3B",
        _shape(2048, 48, 32, 4, 128, decoder_sparse_step=1, mlp_only_layers=[], **_EXPERTS),
    ),
    ("olmoe", "OLMoE-1B-7B", _shape(2048, 16, 16, 16, 128, **_EXPERTS)),
    ("mixtral", "Mixtral-8x7B", _shape(4096, 32, 32, 8, 128, num_local_experts=2, num_experts_per_tok=1)),
    (
        "gpt_oss",
        "gpt-oss-20b",
        _shape(2880, 24, 64, 8, 64, num_local_experts=2, num_experts_per_tok=1, sliding_window=128),
    ),
    (
        "gemma3_text",
        "Gemma 3 12B",
        _shape(3840, 48, 16, 8, 256, sliding_window=1024, sliding_window_pattern=6, query_pre_attn_scalar=256),
    ),
    (
        "granite",
        "Granite-3.3-8B",
        _shape(
            4096, 40, 32, 8, 128, logits_scaling=16.0, attention_multiplier=0.01, embedding_multiplier=12.0,
            residual_multiplier=0.22, attention_bias=False, mlp_bias=False,
        ),
    ),
    (
        "glm4_moe",
        "GLM-4.5-Air",
        _shape(
            4096, 46, 96, 8, 128, n_routed_experts=2, n_shared_experts=1, num_experts_per_tok=1, n_group=1,
            topk_group=1, moe_intermediate_size=256, routed_scaling_factor=1.0, first_k_dense_replace=1,
            norm_topk_prob=True, use_qk_norm=False, attention_bias=True, partial_rotary_factor=0.5,
            scoring_func="sigmoid",
        ),
    ),
    ("mimo", "MiMo-7B", _shape(4096, 36, 32, 8, 128, num_nextn_predict_layers=0)),
    (
        "qwen3_next",
        "Qwen3-Next-80B-A3B",
        _shape(
            2048, 48, 16, 2, 256, full_attention_interval=4, linear_num_value_heads=32, linear_num_key_heads=16,
            linear_key_head_dim=128, linear_value_head_dim=128, linear_conv_kernel_dim=4, decoder_sparse_step=1,
            shared_expert_intermediate_size=256, mlp_only_layers=[], partial_rotary_factor=0.25, **_EXPERTS,
        ),
    ),
)  # fmt: skip


def layouts(family: str, config: Mapping[str, Any]) -> list[tuple[KVLayout, str]]:
    """Return what is cached in bf16, in f32, at 8 and at 4 bits, and how the last two are quantized."""
    mlx_runtime.prepare()
    from edger1.kernels.latent_expanding import planned
    from edger1.kv_layout import kv_layout, without_values
    from edger1.quantized_kv import choose

    module = importlib.import_module(f"mlx_lm.models.{family}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": family, **config}))
    found = []
    with planned(model):
        for nbytes, bits in ((2, None), (4, None), (4, 8), (4, 4)):
            with without_values():
                quantization = choose(model, bits, family)
            layout = kv_layout(model, nbytes, 16, quantization)
            found.append((layout, "" if quantization is None else quantization.describe()))
    return found


def per_token(layout: KVLayout) -> int:
    """Bytes that one token more takes, where no window is involved."""
    return sum(layer.bytes_per_token for layer in layout.layers if layer.window_tokens is None)


def _bounded(layout: KVLayout) -> str:
    windows = [layer.window_tokens for layer in layout.layers if layer.window_tokens is not None]
    states = sum(layer.bytes_per_token == 0 for layer in layout.layers)
    if windows:
        return f"{len(windows)} layers hold {windows[0]:,} tokens and no more"
    return f"{states} layers hold a state of fixed size" if states else ""


def rows() -> Iterator[str]:
    """Return the table."""
    yield "| mlx-lm's architecture | as in | layers | bf16 | f32 | 8 bits | 4 bits | beside |"
    yield "|---|---|---|---|---|---|---|---|"
    for family, name, config in MODELS:
        found = [layout for layout, _ in layouts(family, config)]
        cells = [f"{per_token(layout):,}" for layout in found]
        yield f"| `{family}` | {name} | {config['num_hidden_layers']} | {' | '.join(cells)} | {_bounded(found[0])} |"


def main() -> None:
    """Write the page, or with --check fail where it is stale."""
    script = Path(__file__).name
    write_or_check(TARGET, renewed(TARGET.read_text(encoding="utf-8"), script, {"begin": rows}), script)


if __name__ == "__main__":
    main()
