"""The slots of a layer: what is asked for is there, guesses make way, memory goes back and comes again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from children import until

from edger1.errors import StreamError
from edger1.experts import page_cache
from edger1.experts import store as store_module
from edger1.experts.anatomy import LayerExperts, Part
from edger1.experts.bank import Bank
from edger1.experts.figures import empty
from edger1.experts.layer import StreamedExperts
from edger1.experts.policy import LRU
from edger1.experts.prefetch import Trial
from edger1.experts.store import Store

EXPERTS, ROWS = 12, 5000


@pytest.fixture
def layer(tmp_path: Path) -> LayerExperts:
    """Expert e is e + 1 throughout, in float32 and in bfloat16."""
    file = tmp_path / "experts"
    values = np.repeat(np.arange(1, EXPERTS + 1, dtype=np.float32), ROWS)
    file.write_bytes(values.tobytes() + (values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    full = Part("up_proj", "weight", file, 0, 4 * ROWS, (ROWS,), "F32")
    half = Part("up_proj", "scales", file, EXPERTS * 4 * ROWS, 2 * ROWS, (ROWS,), "BF16")
    return LayerExperts(0, "layer", EXPERTS, 2, (full, half))


@pytest.fixture
def store(layer: LayerExperts) -> Iterator[Store]:
    made = Store([layer])
    yield made
    made.close()


def holds(bank: Bank, expert: int) -> bool:
    """Whether the slot of an expert has its values."""
    slot = int(bank.table[expert])
    rows = [array[slot].astype(mx.float32) for array in bank.arrays.values()]
    return slot >= 0 and all(np.array(row == expert + 1).all() for row in rows)


class Gate:
    """Holds reads back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._open, preadv = threading.Event(), os.preadv
        self._open.set()

        def held(*given: Any) -> int:
            self._open.wait(30)
            return preadv(*given)

        monkeypatch.setattr(store_module.os, "preadv", held)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


def test_what_is_asked_for_is_there_and_the_oldest_leaves(layer: LayerExperts, store: Store) -> None:
    bank = Bank(layer, 4, store, LRU(EXPERTS))
    for step in range(40):
        chosen = [(3 * step) % EXPERTS, (5 * step + 1) % EXPERTS]
        bank.policy.use(chosen)
        bank.ensure(chosen)
        assert all(holds(bank, expert) for expert in chosen)
        assert bank.present <= 4
        assert (bank.table >= 0).sum() == len({int(s) for s in bank.table if s >= 0})
    assert all(holds(bank, expert) for expert in bank.resident())
    assert bank.nbytes == 4 * layer.expert_bytes


def test_a_guess_that_comes_while_others_are_asked_for(layer: LayerExperts, store: Store) -> None:
    bank = Bank(layer, 4, store, LRU(EXPERTS))
    guess = bank.request(5, (), guessed=True)
    assert guess is not None
    assert guess.wait(10)
    # Nobody has taken note of it yet: it is missing still when this begins, and there when its turn comes.
    bank.ensure([2, 5])
    assert holds(bank, 2)
    assert holds(bank, 5)
    assert bank.present == 2


def test_more_experts_than_slots_are_refused(layer: LayerExperts, store: Store) -> None:
    bank = Bank(layer, 2, store, LRU(EXPERTS))
    with pytest.raises(ValueError, match="3 experts at once in 2 slots"):
        bank.ensure([1, 2, 3])


def test_a_slot_of_a_failed_read_is_free_again(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank(layer, 2, store, LRU(EXPERTS))

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(store_module.os, "preadv", fail)
        with pytest.raises(StreamError):
            bank.ensure([3, 4])
    assert bank.present == 0
    bank.ensure([3, 4])
    assert holds(bank, 3)
    assert holds(bank, 4)


def test_a_guess_that_is_asked_for_is_read_once(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank = Bank(layer, 3, store, LRU(EXPERTS))
    gate.close()
    guess = bank.request(7, (), guessed=True)
    assert bank.request(7, ()) is guess
    assert guess is not None
    assert not guess.guessed
    bank.give_up_guesses(())
    gate.open()
    assert guess.wait(10)
    bank.settle()
    assert holds(bank, 7)
    assert store.counts.nbytes == layer.expert_bytes


def test_guesses_that_are_given_up_free_their_slots(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank = Bank(layer, 2, store, LRU(EXPERTS))
    gate.close()
    guesses = [bank.request(expert, (), guessed=True) for expert in (7, 8)]
    until(lambda: not store._guessed, "a thread that has begun with each")
    bank.give_up_guesses({3, 4})
    assert bank.request(3, {3, 4}) is None
    assert set(bank.others_under_way([])) == set(guesses)
    gate.open()
    for guess in guesses:
        assert guess is not None
        assert guess.wait(10)
    bank.ensure([3, 4])
    assert holds(bank, 3)
    assert holds(bank, 4)
    assert bank.table[7] < 0


def test_guesses_that_come_while_they_are_given_up_make_way(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank = Bank(layer, 2, store, LRU(EXPERTS))
    streaming: Any = SimpleNamespace(
        figures=empty(1), device=SimpleNamespace(finish=lambda: None), patience_s=10, check=lambda: None
    )
    held = StreamedExperts(bank, streaming)
    gate.close()
    guesses = [bank.request(expert, (), guessed=True) for expert in (7, 8)]
    give_up = bank.give_up_guesses

    def come_first(*given: Any, **how: Any) -> None:
        gate.open()
        assert all(guess is not None and guess.wait(10) for guess in guesses)
        give_up(*given, **how)

    monkeypatch.setattr(bank, "give_up_guesses", come_first)
    held._wait(held._request([3, 4], [3, 4]))
    assert holds(bank, 3)
    assert holds(bank, 4)


class SlowArrivals:
    """Arrivals whose teller takes a while; `said` is what they were told, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, int]] = []
        self.go = threading.Event()
        self.telling = threading.Event()

    def expect(self, slots: list[int]) -> None:
        self.said += [("expect", slot) for slot in slots]

    def done(self, slot: int) -> None:
        self._late("done", slot)

    def fail(self, slot: int) -> None:
        self._late("fail", slot)

    def _late(self, what: str, slot: int) -> None:
        self.telling.set()
        assert self.go.wait(10)
        self.said.append((what, slot))


@pytest.mark.parametrize("fails", [False, True])
def test_a_slot_is_not_used_again_before_its_last_read_was_told(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Else what is told of the one would be taken for the other, and a slot computed with that is still to be read."""

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    bank = Bank(layer, 1, store, LRU(EXPERTS))
    bank.arrivals = arrivals = SlowArrivals()
    if fails:
        monkeypatch.setattr(store_module.os, "preadv", fail)
    first = bank.request(3, ())
    assert first is not None
    assert arrivals.telling.wait(10)
    threading.Timer(0.1, arrivals.go.set).start()
    deadline = time.monotonic() + 60
    while (second := bank.request(4, {4})) is None:
        assert first.wait(10)
        assert time.monotonic() < deadline, "the slot never became free"
    assert second.wait(10)
    assert arrivals.said == [("expect", 0), ("fail" if fails else "done", 0)] * 2


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="giving pages back needs Linux")
def test_memory_goes_back_and_comes_again(layer: LayerExperts, store: Store) -> None:
    bank = Bank(layer, 6, store, LRU(EXPERTS))
    bank.ensure([0, 1, 2, 3, 4, 5])
    assert bank.shrink(4, keep={5}) > 0
    assert bank.usable_slots == 2
    assert bank.nbytes == 2 * layer.expert_bytes
    assert holds(bank, 5)
    bank.ensure([9], keep={5})
    assert holds(bank, 9)
    assert holds(bank, 5)
    assert bank.grow(3) == 3 * layer.expert_bytes
    bank.ensure([1, 2, 3, 5])
    assert all(holds(bank, expert) for expert in (1, 2, 3, 5))
    assert bank.grow(9) == layer.expert_bytes
    assert bank.usable_slots == 6


def test_where_no_memory_goes_back_no_expert_leaves_for_it(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_cache, "sys", SimpleNamespace(platform="darwin"))
    bank = Bank(layer, 4, store, LRU(EXPERTS))
    bank.ensure([0, 1, 2, 3])
    assert bank.shrink(2) == 0
    assert bank.resident() == [0, 1, 2, 3]
    assert bank.usable_slots == 4


def test_every_expert_in_the_slot_of_its_number(layer: LayerExperts, store: Store) -> None:
    bank = Bank(layer, EXPERTS, store, LRU(EXPERTS))
    for read in bank.load_all():
        assert read.wait(10)
    bank.settle()
    assert bank.identity
    assert bank.table.tolist() == list(range(EXPERTS))
    assert all(holds(bank, expert) for expert in range(EXPERTS))
    if bank.shrink(1):
        assert not bank.identity


def test_a_trial_keeps_what_is_faster() -> None:
    for pays in (True, False):
        trial = Trial(span=4, rounds=2, again=50)
        tokens = 0
        while trial.trying:
            trial.note((0.5 if pays else 1.5) if trial.on else 1.0)
            tokens += 1
            assert tokens < 100
        assert trial.on is pays
        for _ in range(50):
            trial.note(1.0)
        assert trial.trying


def test_a_trial_leaves_off_what_changes_nothing() -> None:
    trial = Trial(span=4, rounds=2)
    for _ in range(100):
        trial.note(1.0)
    assert not trial.trying
    assert not trial.on


def test_guesses_for_longer_stay_until_their_slots_are_needed(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank = Bank(layer, 8, store, LRU(EXPERTS))
    gate.close()
    reads = [bank.request(expert, (), guessed=True, lasting=True) for expert in range(8)]
    bank.give_up_guesses({11})
    assert set(bank.loading) == set(range(8))
    bank.give_up_guesses({11}, lasting=True)
    assert not bank.loading
    # Those that no thread has begun with are free at once.
    assert sum(read is not None and read.done for read in reads) >= 4
    gate.open()
    bank.ensure([11])
    assert holds(bank, 11)


def test_who_needs_experts_at_once_does_not_wait_for_a_warm_start(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses that hold all slots, however long they are good for, make way for what is asked for."""
    gate = Gate(monkeypatch)
    bank = Bank(layer, 8, store, LRU(EXPERTS))
    gate.close()
    for expert in range(8):
        bank.request(expert, (), guessed=True, lasting=True)
    opening = threading.Timer(0.2, gate.open)
    opening.start()
    bank.ensure([10, 11, 3], [10, 11, 3])
    opening.join(60)
    assert all(holds(bank, expert) for expert in (3, 10, 11))


def test_a_warm_start_is_not_given_up_by_the_first_call(
    layer: LayerExperts, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    bank = Bank(layer, 4, store, LRU(EXPERTS))
    gate.close()
    read = bank.request(2, (), guessed=True, lasting=True)
    bank.request(3, (), guessed=True)
    bank.give_up_guesses({5})
    assert set(bank.loading) == {2}
    gate.open()
    assert read is not None
    assert read.wait(10)
    bank.settle()
    assert holds(bank, 2)
