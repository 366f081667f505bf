"""The part of `edger1 doctor --selftest` that tries streaming: passes here, and would notice what goes wrong."""

from __future__ import annotations

import json

import pytest

from edger1 import worker
from edger1.experts import selftest as module
from edger1.experts.bank import Bank
from edger1.experts.device import MLXDevice
from edger1.experts.selftest import selftest, slot_writes


def test_it_passes_and_is_plain_json() -> None:
    report = worker.call(lambda: selftest(quick=True))
    assert json.loads(json.dumps(report)) == report
    assert report["ok"]
    assert report["exactness"] == {"exact": True, "fast": True}
    assert report["slot_writes"]["wrong"] == 0
    assert report["read_back_us"] > 0


def test_speeds_are_of_the_shares_asked_for() -> None:
    found = worker.call(lambda: module.speed(module.Path(module.__file__).parents[1] / "assets" / "nano-moe"))
    assert found["resident"]["tokens_per_s"] > 0
    assert found["100% in slots"]["hit_rate"] is None
    assert 0 < found["25% in slots"]["hit_rate"] < found["50% in slots"]["hit_rate"] < 1


def test_slots_overwritten_too_early_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for MLX, and with results that are computed late, slots change under what reads them."""
    monkeypatch.setattr(MLXDevice, "finish", lambda _: None)
    monkeypatch.setattr(MLXDevice, "begin", lambda *_: None)
    assert slot_writes(30)["wrong"] > 0


def test_a_slot_with_another_expert_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    ensure = Bank.ensure

    def swapped(self: Bank, experts: list[int], keep: tuple[int, ...] = ()) -> None:
        ensure(self, experts, keep)
        a, b = experts[:2]
        self.table[a], self.table[b] = self.table[b], self.table[a]

    monkeypatch.setattr(Bank, "ensure", swapped)
    assert slot_writes(10)["wrong"] > 0
