"""The arithmetic of the memory plan, against figures that are known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1.errors import MemoryCeilingError
from edger1.memory import KVLayout, LayerCache, Plan, activation_bytes, choose_context, make_plan


def test_grouped_query_caches_have_a_step_of_room_at_most() -> None:
    smollm2 = KVLayout((LayerCache(0, 2 * 3 * 64 * 4),) * 30, step_tokens=16)
    assert smollm2.nbytes(512) == 30 * 2 * 3 * 64 * 4 * (512 + 256)


def test_what_is_set_aside_grows_in_whole_steps_up_to_the_context() -> None:
    layout = KVLayout((LayerCache(0, 10),), step_tokens=16)
    assert layout.claimed_bytes(1, 1000) == layout.claimed_bytes(256, 1000) == layout.nbytes(256)
    assert layout.claimed_bytes(257, 1000) == layout.nbytes(512)
    assert layout.claimed_bytes(900, 1000) == layout.claimed_bytes(1000, 1000) == layout.nbytes(1000)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 600), min_size=1, max_size=6))
def test_no_cache_has_more_room_than_is_planned(steps: list[int]) -> None:
    """However a text comes, in chunks or token by token."""
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.models.cache import KVCache

    cache, layout = KVCache(), KVLayout((LayerCache(0, 2 * 2 * 4),), step_tokens=16)
    for step in steps:
        cache.update_and_fetch(mx.zeros((1, 1, step, 2)), mx.zeros((1, 1, step, 2)))
        assert cache.keys.nbytes + cache.values.nbytes <= layout.nbytes(cache.offset)


def test_a_window_and_a_state_do_not_grow_with_the_context() -> None:
    layout = KVLayout((LayerCache(0, 8, window_tokens=128), LayerCache(1000, 0)), step_tokens=16)
    assert layout.nbytes(10_000) == 8 * (128 + 16) + 1000


def test_scores_that_no_kernel_fuses_are_counted() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100}
    assert activation_bytes(config, 16, 1000) - activation_bytes(config, 16, 0) == 4 * 16 * 2 * 4 * 1000


def test_context_is_the_models_limit_or_8192() -> None:
    assert choose_context({"max_position_embeddings": 2048}, None) == 2048
    assert choose_context({"max_position_embeddings": 131072}, None) == 8192
    assert choose_context({}, None) == 8192
    assert choose_context({"max_position_embeddings": 2048}, 100) == 100


def test_a_tokenizer_is_as_large_as_its_file_allows_and_takes_more_while_it_is_read() -> None:
    config, kv = {"vocab_size": 100_000, "hidden_size": 8}, KVLayout((LayerCache(0, 1),), step_tokens=1)

    def plan(file_bytes: int | None) -> Plan:
        return make_plan(
            config, 0, kv, context=1, ceiling_bytes=0, fused_attention=True, tokenizer_file_bytes=file_bytes
        )

    assert plan(None) == plan(10**7)
    assert plan(None).process_bytes - plan(240_000).process_bytes == 90_000 * 768
    # Reading it is over before there is anything in the caches: the larger of both counts.
    huge = plan(None)
    assert huge.total_bytes == huge.process_bytes + huge.loading_bytes > huge.beside_banks_bytes
    assert huge.total_with(10**9) == huge.beside_banks_bytes + 10**9


def test_a_plan_that_does_not_fit_names_the_ceiling_that_would_do() -> None:
    plan = make_plan(
        {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 10},
        1_000_000_000,
        KVLayout((LayerCache(0, 64), LayerCache(0, 64)), step_tokens=16),
        context=100,
        ceiling_bytes=900_000_000,
        fused_attention=True,
    )
    assert plan.kv_bytes == 2 * 64 * (100 + 256)
    with pytest.raises(MemoryCeilingError, match=r"m with a context of 100 tokens needs 1\.\d+ GB.*900 MB"):
        plan.check("m")
    Plan(**{**plan.__dict__, "ceiling_bytes": plan.smallest_ceiling_bytes}).check("m")
