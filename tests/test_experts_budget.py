"""How a byte budget becomes slots, and what may be expected of them: arithmetic, without a model."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1.errors import MemoryCeilingError, UsageError
from edger1.experts.anatomy import LayerExperts, Part
from edger1.experts.budget import (
    Prediction,
    StreamPlan,
    allocate,
    choose_step,
    least_slots,
    parse_slots,
    plan_stream,
    predict_tokens_per_s,
    shares,
    slot_bytes,
    slots_by_hand,
    staging_bytes,
    with_experts,
)
from edger1.memory import Plan
from edger1.units import format_bytes

MB = 1_000_000


def layer(index: int = 0, *, experts: int = 16, top_k: int = 2, hidden: int = 64, inner: int = 32) -> LayerExperts:
    """A layer of f32 experts."""
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    parts = tuple(
        Part(name, "weight", Path("model.safetensors"), 0, 4 * hidden * inner, shape, "F32")
        for name, shape in shapes.items()
    )
    return LayerExperts(index, f"layers.{index}.mlp.switch_mlp", experts, top_k, parts)


def resident(ceiling_bytes: int, weights: int = 100 * MB) -> Plan:
    return Plan(weights, 10 * MB, 20 * MB, 30 * MB, context=100, ceiling_bytes=ceiling_bytes)


def saved(layers: list[LayerExperts], ranked: list[list[float]], slots: tuple[int, ...]) -> float:
    """Bytes of reading a token is spared by having the most popular experts in slots."""
    return sum(x.top_k * sum(r[:n]) * x.expert_bytes for x, r, n in zip(layers, ranked, slots, strict=True))


def test_alike_layers_get_alike_slots_and_the_budget_is_used_up() -> None:
    layers = [layer(i) for i in range(3)]
    least = sum(slot_bytes(x, least_slots(x)) for x in layers)
    assert allocate(layers, least + 7 * layers[0].expert_bytes, shares(layers, None)) == (5, 4, 4)
    assert allocate(layers, 10**12, shares(layers, None)) == (16, 16, 16)


def test_every_layer_has_room_for_all_experts_of_a_token_whatever_the_budget() -> None:
    layers = [layer(top_k=8), layer(top_k=1), layer(experts=2, top_k=4)]
    assert allocate(layers, 0, shares(layers, None)) == (8, 2, 2)


def test_experts_of_a_token_take_turns_only_where_there_is_no_room_for_all() -> None:
    layers = [layer(top_k=8), layer(top_k=8)]
    ranked = shares(layers, None)
    enough = sum(slot_bytes(x, 8) for x in layers)
    assert allocate(layers, enough, ranked, in_turns=True) == (8, 8)
    assert allocate(layers, enough - 1, ranked, in_turns=True) == (8, 7)
    assert allocate(layers, 0, ranked, in_turns=True) == (2, 2)
    assert allocate(layers, enough - 1, ranked) == (8, 8)
    # A layer of the fewest slots is smaller, and so is the smallest ceiling.
    few, all_at_once = (plan_stream(layers, 0, prefill_tokens=1, in_turns=turns) for turns in (True, False))
    assert all_at_once.least_bank_bytes - few.least_bank_bytes == 12 * layers[0].expert_bytes


def test_slots_go_where_they_save_most() -> None:
    layers = [layer(0), layer(1)]
    skewed = [1000.0] * 6 + [0.0] * 10
    budget = sum(slot_bytes(x, 2) for x in layers) + 4 * layers[0].expert_bytes
    assert allocate(layers, budget, shares(layers, [skewed, [1.0] * 16])) == (6, 2)
    # A miss that costs much more elsewhere turns that round.
    assert allocate(layers, budget, shares(layers, [skewed, [1.0] * 16]), [1.0, 100.0]) == (2, 6)


counts = st.lists(st.integers(0, 50), min_size=4, max_size=4)


@settings(max_examples=50)
@given(st.lists(counts, min_size=1, max_size=3), st.integers(0, 12))
def test_no_other_division_saves_more(popularity: list[list[int]], extra: int) -> None:
    layers = [layer(i, experts=4, top_k=1) for i in range(len(popularity))]
    ranked = shares(layers, popularity)
    budget = sum(slot_bytes(x, 2) for x in layers) + extra * layers[0].expert_bytes
    chosen = allocate(layers, budget, ranked)
    assert sum(chosen) <= 2 * len(layers) + extra
    possible = (s for s in itertools.product(range(2, 5), repeat=len(layers)) if sum(s) <= 2 * len(layers) + extra)
    assert saved(layers, ranked, chosen) == pytest.approx(max(saved(layers, ranked, s) for s in possible))


def test_what_does_not_fit_one_layer_goes_to_one_with_smaller_experts() -> None:
    layers = [layer(0, hidden=640), layer(1)]
    least = sum(slot_bytes(x, 2) for x in layers)
    assert allocate(layers, least + layers[0].expert_bytes - 1, shares(layers, None)) == (2, 11)


def test_expected_hits_are_the_share_of_the_most_popular_experts() -> None:
    layers = [layer(experts=4, top_k=1), layer(experts=4, top_k=3)]
    plan = plan_stream(layers, 0, prefill_tokens=1, popularity=[[6, 0, 89, 1], []])
    assert plan.slots == (2, 3)
    # One use is added to each expert.
    assert plan.hit_rates == pytest.approx(((90 + 7) / 100, 3 / 4))
    assert plan.hit_rate == pytest.approx((0.97 + 3 * 0.75) / 4)
    assert plan.known
    assert not plan_stream(layers, 0, prefill_tokens=1).known
    assert plan_stream(layers, 10**12, prefill_tokens=1).hit_rate == 1


def test_popularity_of_another_model_counts_for_nothing() -> None:
    layers = [layer(experts=4), layer(experts=4)]
    assert shares(layers, [[1, 2, 3]]) == shares(layers, None) == [[0.25] * 4] * 2


def test_staging_counts_readers_and_what_prefill_keeps_of_a_chunk() -> None:
    x = layer(top_k=2, hidden=64, inner=32)
    reading = 4 * (64 * 32 * 4 + 2 * 4096)
    assert staging_bytes([x], 0, read_threads=4) == reading
    # Two pairs a token, of which each has a row in, a row out and three inner rows in f32.
    assert staging_bytes([x], 10) - reading == 10 * 2 * 4 * (2 * 64 + 3 * 32)
    assert staging_bytes([x, layer(hidden=6)], 10) == staging_bytes([x], 10)


def test_banks_are_lent_what_the_context_does_not_take_yet() -> None:
    layers = [layer(experts=64), layer(experts=64)]
    size = layers[0].expert_bytes
    # What arrays take beyond their values is as much as two experts.
    room = staging_bytes(layers, 1) + 22 * size
    plan = plan_stream(layers, room, prefill_tokens=1, lent_bytes=10 * size)
    assert sum(plan.slots) == 20
    assert sum(plan.lent_slots) == 30
    assert plan.bank_bytes == plan_stream(layers, room, prefill_tokens=1).bank_bytes
    by_hand = plan_stream(layers, room, prefill_tokens=1, lent_bytes=10 * size, expert_slots=4)
    assert by_hand.slots == by_hand.lent_slots == (4, 4)


def test_large_parts_are_read_through_whole_huge_pages() -> None:
    large = layer(top_k=2, hidden=512, inner=512)
    assert max(part.nbytes for part in large.parts) == 1 << 20
    assert staging_bytes([large], 0, read_threads=4) == 4 * (2 << 20)


@pytest.mark.parametrize(("asked", "value"), [("7", 7), (7, 7), ("25%", 0.25), (" 12.5% ", 0.125), ("100%", 1.0)])
def test_slots_are_a_number_or_a_share(asked: str | int, value: float) -> None:
    assert parse_slots(asked) == value
    assert isinstance(parse_slots(asked), type(value))


@pytest.mark.parametrize("asked", ["", "0", 0, "0%", "101%", "-3", "1.5", "a", "%", True, 2.5, "9" * 400])
def test_other_slots_are_refused(asked: str | int) -> None:
    with pytest.raises(UsageError, match="expert_slots is"):
        parse_slots(asked)


def test_slots_by_hand() -> None:
    layers = [layer(experts=16, top_k=2), layer(experts=9, top_k=4)]
    assert slots_by_hand(layers, 12) == (12, 9)
    # A share is rounded up, and never below what a token needs.
    assert slots_by_hand(layers, "50%") == (8, 5)
    assert slots_by_hand(layers, "1%") == (2, 4)
    assert slots_by_hand(layers, "100%") == (16, 9)
    with pytest.raises(UsageError, match="expert_slots is 3, but each token asks for 4 experts.*4 or more"):
        slots_by_hand(layers, 3)


def test_what_fits_stays_resident_and_tells_the_smaller_ceiling() -> None:
    x = layer(experts=1000, hidden=640, inner=32)
    experts = x.experts * x.expert_bytes
    plan = with_experts(resident(10**9, weights=5 * MB + experts), [x], 5 * MB, prefill_tokens=16)
    assert plan.slots is None
    assert plan.resident_bytes == 5 * MB + experts
    least = plan.smallest_ceiling_bytes
    assert least < plan.total_bytes
    # That ceiling works, and one byte less does not.
    smallest = with_experts(resident(least, weights=5 * MB + experts), [x], 5 * MB, prefill_tokens=16)
    assert (smallest.slots, smallest.total_bytes) == ((2,), least)
    smallest.check("m")
    short = with_experts(resident(least - 1, weights=5 * MB + experts), [x], 5 * MB, prefill_tokens=16)
    with pytest.raises(MemoryCeilingError, match=f"needs {format_bytes(least, up=True)} of memory"):
        short.check("m")


def test_banks_take_what_the_ceiling_leaves() -> None:
    layers = [layer(i, experts=100, hidden=640, inner=32) for i in range(3)]
    experts = sum(x.experts * x.expert_bytes for x in layers)
    for ceiling in (90 * MB, 100 * MB, 120 * MB):
        plan = with_experts(resident(ceiling, 5 * MB + experts), layers, 5 * MB, prefill_tokens=16)
        plan.check("m")
        assert plan.stream is not None
        assert plan.resident_bytes == 5 * MB
        # Not another expert fits.
        assert 0 <= ceiling - plan.total_bytes < layers[0].expert_bytes


def test_slots_asked_for_are_given_where_all_would_fit_and_refused_where_they_do_not() -> None:
    x = layer(experts=100, hidden=640, inner=32)
    all_of_it = 5 * MB + x.experts * x.expert_bytes
    plan = with_experts(resident(10**9, all_of_it), [x], 5 * MB, prefill_tokens=16, expert_slots="25%")
    assert plan.slots == (25,)
    assert plan.smallest_ceiling_bytes < plan.total_bytes
    plan.check("m")
    tight = with_experts(resident(plan.total_bytes - 1, all_of_it), [x], 5 * MB, prefill_tokens=16, expert_slots="25%")
    with pytest.raises(MemoryCeilingError, match=r"expert slots that were asked for.*--expert-slots: 6\d\.\d MB would"):
        tight.check("m")


def test_experts_smaller_than_the_buffers_of_streaming_are_not_streamed() -> None:
    x = layer(experts=2, top_k=1, hidden=8, inner=8)
    plan = with_experts(resident(1, 5 * MB), [x], 5 * MB - 2 * x.expert_bytes, prefill_tokens=512)
    assert plan.stream is None
    assert plan.smallest_ceiling_bytes == plan.total_bytes


def test_prefill_steps_are_as_long_as_the_banks_can_afford() -> None:
    x = layer(experts=100, hidden=640, inner=32)
    all_of_it = 5 * MB + x.experts * x.expert_bytes
    steps = (512, 256, 128, 64, 32)

    def chosen(ceiling: int) -> int:
        plans = [with_experts(resident(ceiling, all_of_it), [x], 5 * MB, prefill_tokens=step) for step in steps]
        return steps[choose_step(plans)]

    # A step of 512 tokens takes 5.6 MB, and an expert 0.25.
    assert chosen(65 * MB + 20 * MB) == 512
    assert chosen(65 * MB + 10 * MB) == 256
    assert chosen(65 * MB + 3 * MB) == 32
    assert chosen(1) == 32


def test_banks_set_by_hand_leave_the_longest_step_that_fits() -> None:
    x = layer(experts=100, hidden=640, inner=32)
    steps = (512, 256, 32)

    def chosen(ceiling: int) -> int:
        model = resident(ceiling, 5 * MB + x.experts * x.expert_bytes)
        plans = [with_experts(model, [x], 5 * MB, prefill_tokens=step, expert_slots=4) for step in steps]
        return steps[choose_step(plans, by_hand=True)]

    assert chosen(1000 * MB) == 512
    assert chosen(65 * MB + 5 * MB) == 256
    assert chosen(1) == 32


def test_a_dense_model_has_no_slots() -> None:
    plan = resident(10**9)
    assert with_experts(plan, [], plan.resident_bytes, prefill_tokens=16) is plan
    with pytest.raises(UsageError, match="has none"):
        with_experts(plan, [], plan.resident_bytes, prefill_tokens=16, expert_slots=4)


def test_predicted_speed_overlaps_reads_with_what_hits_compute() -> None:
    assert predict_tokens_per_s(10 * MB, 1e9) == pytest.approx(100)
    stream = StreamPlan((2,), (2,), (4,), (4,), (MB,), 0, 0, 0, (0.5,), 0.5, known=True, by_hand=False)
    # 10 ms of other weights; 2 experts compute in 2 ms while 2 are read in 20 ms, and compute in 2 ms.
    assert predict_tokens_per_s(10 * MB, 1e9, stream, 1e8) == pytest.approx(1 / 0.032)
    # A disk so fast that the reads hide.
    assert predict_tokens_per_s(10 * MB, 1e9, stream, 1e10) == pytest.approx(1 / 0.014)
    with pytest.raises(ValueError, match="disk"):
        predict_tokens_per_s(10 * MB, 1e9, stream)


def test_a_plan_survives_json() -> None:
    x = layer(experts=100)
    plan = with_experts(resident(10**9), [x], 5 * MB, prefill_tokens=16, expert_slots=9)
    plan = dataclasses.replace(plan, prediction=Prediction(3.5, 1e10, 1e9))
    assert Plan.from_json(json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
    assert Plan.from_json(dataclasses.asdict(resident(5))) == resident(5)
