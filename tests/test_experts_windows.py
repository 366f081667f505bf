"""Optimistic windows give what reading back in every layer gives, bit for bit, and read back less often."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import families  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402

from benchmarks.memory_bank import MemoryBank, stream  # noqa: E402
from edger1.errors import EdgeR1Error  # noqa: E402
from edger1.experts import windows as windows_module  # noqa: E402
from edger1.experts.device import SimulatedDevice  # noqa: E402
from edger1.experts.windows import Windows  # noqa: E402

PROMPT = [3, 17, 99, 150, 42, 7, 180, 61, 3, 88, 120, 5]
TOKENS = 14
LAYERS, EXPERTS, SLOTS = 7, 8, 4
NO_WINDOWS = {
    "deepseek_v41": "its layers are handed a dict, which they may have changed",
    "kimi_k3": "its layers are handed a ResidualBlocks, which they may have changed",
}
FAMILIES = ("deepseek_v3", "qwen3_moe", "olmoe", "mixtral", "gpt_oss")


class FixedWidth:
    """In place of the controller: one width for all tokens, and what the controller would have been told."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.hits: list[tuple[int, bool]] = []
        self.times: list[tuple[int, float]] = []
        self.costs = self

    def hit(self, layer: int, full: bool) -> None:
        self.hits.append((layer, full))

    def add(self, layers: int, seconds: float) -> None:
        self.times.append((layers, seconds))

    def next(self, layers: Any, decoder_layers: int) -> int:
        return self.width


def deep(family: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model of the family with as many layers as a window may span."""
    monkeypatch.setitem(families.VALUES, "num_hidden_layers", layers)
    given = dict(families.OVERRIDES.get(family, {}))
    if family == "gpt_oss":
        given["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2) + ["sliding_attention"]
    monkeypatch.setitem(families.OVERRIDES, family, given)
    return families.build(family, quantize=family != "mixtral")


def streamed(model: Any, slots: int, width: int) -> tuple[Windows, list[MemoryBank], SimulatedDevice, FixedWidth]:
    device = SimulatedDevice(2e-3, 0.5e-3)
    windows, banks = stream(model, slots, device)
    told = FixedWidth(width)
    windows.controller = told  # type: ignore[assignment]
    return windows, banks, device, told


def greedy(model: Any, count: int = TOKENS, prompt: list[int] = PROMPT) -> tuple[list[int], Any, list[Any]]:
    """Tokens and logits of a prompt at once and then one token at a time, and the caches."""
    caches = make_prompt_cache(model)
    x, tokens, logits = mx.array([prompt]), [], []
    for _ in range(count):
        # Only evaluated in the end, but for what the windows read: nothing pending may read a slot that is overwritten.
        logits.append(model(x, cache=caches)[:, -1, :])
        tokens.append(int(mx.argmax(logits[-1], -1).item()))
        x = mx.array([tokens[-1:]])
    return tokens, mx.concatenate(logits), caches


def same_bits(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.array(a).view(np.uint32), np.array(b).view(np.uint32)))


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_change_no_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, logits, _ = greedy(deep(family, LAYERS, monkeypatch))
    model = deep(family, LAYERS, monkeypatch)
    _, banks_read_each, _, told_each = streamed(model, SLOTS, width=1)
    tokens, got, caches_each = greedy(model)
    assert tokens == expected
    assert same_bits(got, logits)
    for width in (2, 3, LAYERS):
        model = deep(family, LAYERS, monkeypatch)
        windows, banks, _, told = streamed(model, SLOTS, width)
        tokens, got, caches = greedy(model)
        assert windows.reason == ""
        assert tokens == expected
        assert same_bits(got, logits)
        for cache, each in zip(caches, caches_each, strict=True):
            assert cache.offset == each.offset
            assert all(same_bits(a, b) for a, b in zip(cache.keys_and_values(), each.keys_and_values(), strict=True))
        # A token's hits are known in the end, however often its layers were computed, and nobody is read twice.
        assert told.hits == told_each.hits
        assert [bank.brought for bank in banks] == [bank.brought for bank in banks_read_each]
    assert any(bank.brought > SLOTS for bank in banks)
    assert {full for _, full in told.hits} == {True, False}


WITH_EXPERTS = [name for name in families.families() if name not in families.UNBUILDABLE and families.has_experts(name)]


@pytest.mark.families
@pytest.mark.parametrize("family", WITH_EXPERTS)
def test_no_family_gives_another_bit(family: str) -> None:
    _, logits, _ = greedy(families.build(family), 6)
    model = families.build(family)
    windows, banks, _, _ = streamed(model, 3, width=4)
    _, got, _ = greedy(model, 6)
    assert same_bits(got, logits)
    assert windows.reason == NO_WINDOWS.get(family, "")
    assert sum(bank.brought for bank in banks)


def test_one_read_back_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("qwen3_moe", LAYERS, monkeypatch)
    windows, banks, device, told = streamed(model, EXPERTS, width=3)
    caches = make_prompt_cache(model)
    step(model, caches, 5)
    for bank in banks:
        # One expert stays out that no token asks for, so that the layers must be asked.
        bank.ensure(range(EXPERTS))
    never = [missing(bank) for bank in banks]
    for cost, layers in ((LAYERS, 1), (3, 3), (1, LAYERS), (1, 99)):
        told.width = layers
        before, computed = device.read_backs, device.layers
        step(model, caches, 5)
        assert device.read_backs - before == cost
        assert device.layers - computed == LAYERS
    for bank, (expert, slot) in zip(banks, never, strict=True):
        bank.table[expert] = slot
    before = device.read_backs
    step(model, caches, 5)
    assert device.read_backs == before, "a layer that has all its experts was read back"
    assert windows.reason == ""


def missing(bank: MemoryBank) -> tuple[int, int]:
    """Take out the expert that was used the longest ago."""
    expert = bank.policy.victim(range(EXPERTS), ())
    assert expert is not None
    slot, bank.table[expert] = int(bank.table[expert]), -1
    return expert, slot


def step(model: Any, caches: Any, token: int) -> Any:
    return model(mx.array([[token]]), cache=caches)


def test_a_prompt_goes_the_way_of_who_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("olmoe", 2, monkeypatch)
    windows, _, device, told = streamed(model, SLOTS, width=2)
    assert windows.slots(0, mx.array([[1, 2]])) is None
    mx.eval(model(mx.array([PROMPT]), cache=make_prompt_cache(model)))
    assert (device.read_backs, told.hits) == (0, [])


def test_an_expert_that_moved_before_the_check_counts_as_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    _, logits, _ = greedy(deep("olmoe", 3, monkeypatch))
    model = deep("olmoe", 3, monkeypatch)
    windows, banks, device, _ = streamed(model, EXPERTS - 1, width=3)
    read_back = device.read_back

    def others_fill_slots(array: Any) -> Any:
        chosen = read_back(array)
        if windows._mode == "window" and windows._proved:
            # All experts of a layer trade places between its call and the check.
            for bank in banks:
                there = np.flatnonzero(bank.table >= 0)
                before, after = bank.table[there], np.roll(bank.table[there], 1)
                for _, rows in bank._rows:
                    rows[after] = rows[before]
                bank.table[there] = after
        return chosen

    monkeypatch.setattr(device, "read_back", others_fill_slots)
    _, got, _ = greedy(model)
    assert windows.reason == ""
    assert same_bits(got, logits)


def test_a_model_that_gathers_its_layers_answers_is_read_back_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import olmoe

    def gather(self: Any, inputs: Any, cache: Any = None, mask: Any = None) -> Any:
        h, kept = self.embed_tokens(inputs), []
        mask = olmoe.create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, cache=c)
            kept.append(h * 0.5)
        return self.norm(h + sum(kept))

    monkeypatch.setattr(olmoe.OlmoeModel, "__call__", gather)
    expected, logits, _ = greedy(deep("olmoe", LAYERS, monkeypatch))
    model = deep("olmoe", LAYERS, monkeypatch)
    windows, _, device, _ = streamed(model, SLOTS, width=3)
    tokens, got, _ = greedy(model)
    assert "used elsewhere" in windows.reason
    assert (tokens, same_bits(got, logits)) == (expected, True)
    before = device.read_backs
    step(model, make_prompt_cache(model), 5)
    assert device.read_backs - before == LAYERS


def test_a_model_that_leaves_its_last_layers_out_is_checked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import olmoe

    shorter = [False]

    def leave_out(self: Any, inputs: Any, cache: Any = None, mask: Any = None) -> Any:
        h = self.embed_tokens(inputs)
        mask = olmoe.create_attention_mask(h, cache[0])
        for layer, c in list(zip(self.layers, cache, strict=True))[: 4 if shorter[0] else None]:
            h = layer(h, mask, cache=c)
        return self.norm(h)

    monkeypatch.setattr(olmoe.OlmoeModel, "__call__", leave_out)

    def run(model: Any) -> Any:
        caches, logits = make_prompt_cache(model), []
        for number, token in enumerate(PROMPT):
            shorter[0] = number % 3 == 2
            logits.append(step(model, caches, token))
        return mx.concatenate(logits)

    logits = run(deep("olmoe", LAYERS, monkeypatch))
    model = deep("olmoe", LAYERS, monkeypatch)
    windows, *_ = streamed(model, SLOTS, width=LAYERS)
    assert same_bits(run(model), logits)
    assert windows.reason == ""


def test_a_failed_read_ends_its_token_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(model: Any) -> Any:
        caches = make_prompt_cache(model)
        return mx.concatenate([step(model, caches, token) for token in PROMPT])

    logits = run(deep("olmoe", LAYERS, monkeypatch))
    model = deep("olmoe", LAYERS, monkeypatch)
    windows, banks, _, _ = streamed(model, 2, width=LAYERS)
    step(model, make_prompt_cache(model), 1)
    ensure, failing = banks[4].ensure, [True]

    def broken(experts: Any, keep: Any = ()) -> None:
        if failing[0]:
            raise StreamBrokenError("the disk is gone")
        ensure(experts, keep)

    monkeypatch.setattr(banks[4], "ensure", broken)
    with pytest.raises(StreamBrokenError):
        run(model)
    failing[0] = False
    assert same_bits(run(model), logits)
    assert windows.reason == ""


class StreamBrokenError(EdgeR1Error):
    pass


def test_what_is_still_to_be_computed_reads_no_slot_that_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that nobody has looked at yet belong to the experts that were there when they were asked for."""
    fresh, other = deep("olmoe", 2, monkeypatch), deep("olmoe", 2, monkeypatch)
    streamed(other, 2, width=2)
    for model in (fresh, other):
        mx.eval(step(model, make_prompt_cache(model), 1))
    logits = [[step(model, make_prompt_cache(model), token) for token in PROMPT] for model in (fresh, other)]
    assert same_bits(mx.concatenate(logits[0]), mx.concatenate(logits[1]))


def test_copies_and_models_given_back_know_nothing_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("olmoe", 2, monkeypatch)
    kind, layer = type(model), type(model.layers[0])
    windows, *_ = streamed(model, EXPERTS, width=2)
    assert type(model) is not kind
    copied = copy.deepcopy(model)
    assert copied._windows is None
    windows.uninstall()
    assert (type(model), type(model.layers[0])) == (kind, layer)
    assert "_windows" not in vars(model)


def test_experts_outside_of_decoder_layers_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("olmoe", 2, monkeypatch)
    monkeypatch.setattr(type(model), "layers", [])
    windows = windows_module.install(model, [object()], [MemoryBank(model.model.layers[0].mlp.switch_mlp, 2)], None)
    assert "none of its decoder layers" in windows.reason


def test_a_switch_layer_s_call_is_timed_between_read_backs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep("qwen3_moe", LAYERS, monkeypatch)
    _, _, device, told = streamed(model, SLOTS, width=3)
    greedy(model, 8)
    assert told.times
    for layers, seconds in told.times:
        assert seconds == pytest.approx(device.sync_s + layers * device.compute_s)
