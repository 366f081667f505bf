"""What is read off a model without computing it, against caches that were filled."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from edger1.kv_layout import kv_layout
from edger1.mlx_runtime import prepare

BASE = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LATENT = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32}
EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": BASE,
    # It caches whole keys and values, though its name for them is a latent.
    "deepseek_v2": {**BASE, **LATENT, **EXPERTS, "num_key_value_heads": 4, "rope_scaling": {"factor": 2.0}},
    "deepseek_v3": {**BASE, **LATENT, **EXPERTS, "num_key_value_heads": 4},
    "gemma3_text": {**BASE, "head_dim": 16, "sliding_window": 64, "sliding_window_pattern": 2},
}


def build(family: str, config: dict[str, Any]) -> Any:
    prepare()
    module = importlib.import_module(f"mlx_lm.models.{family}")
    return module.Model(module.ModelArgs.from_dict({"model_type": family, **config}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [5, 300, 700])
def test_the_bound_holds_and_is_near(family: str, tokens: int) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    model = build(family, FAMILIES[family])
    layout = kv_layout(model, 4, step_tokens=16)
    caches = make_prompt_cache(model)
    for at in range(0, tokens, 16):
        model(mx.zeros((1, min(16, tokens - at)), dtype=mx.int32), cache=caches)
    taken = sum(cache.nbytes for cache in caches)
    # A step of 256 tokens may lie open in each layer, and a window is as full as its last prefill step left it.
    slack = layout.nbytes(256)
    assert taken <= layout.nbytes(tokens) <= taken + slack


def test_deepseek_r1_keeps_70272_bytes_a_token() -> None:
    r1 = {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    }
    layout = kv_layout(build("deepseek_v3", r1), 2, step_tokens=16)
    assert (layout.nbytes(2560) - layout.nbytes(1536)) / 1024 == 70_272
