"""The arithmetic of the memory plan, against figures that are known."""

from __future__ import annotations

import pytest

from edger1.errors import MemoryCeilingError
from edger1.memory import Plan, choose_context, kv_bytes_per_token, make_plan


def test_deepseek_r1s_latent_cache() -> None:
    config = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_attention_heads": 128}
    assert kv_bytes_per_token(config, 2) == 70_272


def test_grouped_query_cache() -> None:
    smollm2 = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
    }
    assert kv_bytes_per_token(smollm2, 4) == 30 * 2 * 3 * 64 * 4
    assert kv_bytes_per_token({"text_config": smollm2}, 4) == 30 * 2 * 3 * 64 * 4


def test_context_is_the_models_limit_or_8192() -> None:
    assert choose_context({"max_position_embeddings": 2048}, None) == 2048
    assert choose_context({"max_position_embeddings": 131072}, None) == 8192
    assert choose_context({}, None) == 8192
    assert choose_context({"max_position_embeddings": 2048}, 100) == 100


def test_a_plan_that_does_not_fit_names_the_ceiling_that_would_do() -> None:
    plan = make_plan(
        {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10},
        1_000_000_000,
        context=100,
        ceiling_bytes=900_000_000,
        element_bytes=4,
        prefill_step=16,
    )
    assert plan.kv_bytes == 2 * 2 * 8 * 4 * 100
    with pytest.raises(MemoryCeilingError, match=r"m with a context of 100 tokens needs 1\.\d+ GB.*900 MB"):
        plan.check("m")
    Plan(**{**plan.__dict__, "ceiling_bytes": plan.smallest_ceiling_bytes}).check("m")
