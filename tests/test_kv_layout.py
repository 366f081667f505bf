"""What is read off a model without computing it, against caches that were filled."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from families import UNBUILDABLE, build, families
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3
from mlx_lm.models.cache import make_prompt_cache

from edger1.kv_layout import kv_layout


def elements(cache: Any) -> int:
    return sum(array.size for _, array in tree_flatten(cache.state) if isinstance(array, mx.array))


@pytest.mark.parametrize("family", sorted(set(families()) - set(UNBUILDABLE)))
def test_the_bound_holds_and_is_near(family: str) -> None:
    model = build(family)
    layout = kv_layout(model, 4, step_tokens=100)
    for tokens in (100, 400):
        caches = make_prompt_cache(model)
        for _ in range(tokens // 100):
            # Never evaluated: the shapes are enough.
            model(mx.zeros((1, 100), dtype=mx.int32), cache=caches)
        taken = 4 * sum(map(elements, caches))
        # A step of 256 tokens may lie open in each layer, and windows count as growing where they are not known.
        assert taken <= layout.nbytes(tokens) <= 2 * taken + layout.nbytes(1)


def test_deepseek_r1_keeps_70272_bytes_a_token() -> None:
    r1 = {
        "model_type": "deepseek_v3",
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
    # Whole and random, and no weight of it is ever computed.
    layout = kv_layout(deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(r1)), 2, step_tokens=16)
    assert (layout.nbytes(2560) - layout.nbytes(1536)) / 1024 == 70_272


def test_a_family_that_looks_at_values_is_planned_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("dbrx")
    original = mx.array.tolist

    def read(_: mx.array) -> None:
        raise AssertionError("a value was read")

    monkeypatch.setattr(mx.array, "tolist", read)
    kv_layout(model, 4, step_tokens=100)
    monkeypatch.setattr(mx.array, "tolist", original)
    # And its experts are in place again.
    assert mx.isfinite(model(mx.zeros((1, 2), dtype=mx.int32))).all().item()
