"""When banks give memory back and take it again, with made-up figures; and the control groups these are read from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from tiny import write_mixture

from edger1 import cgroup, memory
from edger1.experts.anatomy import LayerExperts, Part
from edger1.experts.pressure import (
    CALM_S,
    Banks,
    Pressure,
    Reading,
    Space,
    adjust,
    decide,
    group_space,
    machine_space,
    read,
)

MB = 1_000_000
# One space of which 100 MB are the low mark.
PLANNED, LEAST, EXPERT = 1000 * MB, 200 * MB, 5 * MB


def reading(*free: int, stalled: float | None = None) -> Reading:
    return Reading(tuple(Space(bytes_, 8000 * MB, 100 * MB) for bytes_ in free), stalled)


def change(now: Reading, held: int = PLANNED, calm_s: float = 1000.0) -> int:
    return decide(now, Banks(held, PLANNED, LEAST, EXPERT), calm_s)


def test_with_memory_to_spare_nothing_happens() -> None:
    assert change(reading(5000 * MB)) == 0
    assert change(reading(100 * MB)) == 0


def test_below_the_mark_banks_give_back_up_to_twice_the_mark() -> None:
    assert change(reading(60 * MB)) == -140 * MB
    assert change(reading(-50 * MB)) == -250 * MB
    # Of several limits the tightest counts.
    assert change(reading(5000 * MB, 90 * MB, 20 * MB)) == -180 * MB


def test_banks_never_give_what_the_model_needs() -> None:
    assert change(reading(0), held=LEAST + 7 * MB) == -7 * MB
    assert change(reading(0), held=LEAST) == 0


def test_banks_grow_only_when_much_is_free_and_leave_that_margin() -> None:
    assert change(reading(250 * MB), held=500 * MB) == 0
    assert change(reading(360 * MB), held=500 * MB) == 60 * MB
    assert change(reading(9000 * MB), held=500 * MB) == 500 * MB
    assert change(reading(9000 * MB), held=PLANNED) == 0
    # Less than an expert is not worth it.
    assert change(reading(304 * MB), held=500 * MB) == 0
    assert change(reading(9000 * MB), held=PLANNED - 4 * MB) == 0


def test_banks_that_gave_back_stay_small_for_a_while() -> None:
    assert change(reading(9000 * MB), held=500 * MB, calm_s=CALM_S - 1) == 0
    assert change(reading(9000 * MB), held=500 * MB, calm_s=CALM_S) == 500 * MB


def test_waiting_for_memory_doubles_the_marks() -> None:
    assert change(reading(150 * MB, stalled=0.0)) == 0
    assert change(reading(150 * MB, stalled=0.5)) == -250 * MB
    assert change(reading(500 * MB, stalled=0.5), held=500 * MB) == 0
    # Streaming waits for disks itself: stalls alone, with memory to spare, are no reason.
    assert change(reading(5000 * MB, stalled=0.9)) == 0


def test_giving_back_and_growing_do_not_chase_each_other() -> None:
    free, held, moves = 50 * MB, PLANNED, []
    calm = 1000.0
    for _ in range(20):
        step = change(reading(free), held, calm)
        held, free = held + step, free - step
        calm = 0.0 if step < 0 else calm + 1
        moves.append(step)
    assert [move for move in moves if move] == [-150 * MB]


def test_banks_follow_another_program_that_comes_and_goes() -> None:
    now, other = [0.0], [0]
    held = [PLANNED]

    def look() -> Reading:
        return reading(1500 * MB - other[0] - (held[0] - PLANNED))

    pressure = Pressure(PLANNED, LEAST, EXPERT, read=look, clock=lambda: now[0])
    sizes = []
    for second in range(60):
        now[0] = float(second)
        other[0] = 2000 * MB if 10 <= second < 30 else 0
        held[0] += pressure.change_bytes(held[0])
        sizes.append(held[0])
    assert sizes[9] == PLANNED
    assert sizes[11:30] == [PLANNED - 700 * MB] * 19
    assert sizes[-1] == PLANNED


def test_it_looks_once_a_second_only() -> None:
    looks, now = [], [0.0]

    def look() -> Reading:
        looks.append(now[0])
        return reading(0)

    pressure = Pressure(PLANNED, LEAST, EXPERT, read=look, clock=lambda: now[0])
    changes = []
    for step in range(25):
        now[0] = step / 10
        changes.append(pressure.change_bytes(PLANNED))
    assert looks == [0.0, 1.0, 2.0]
    assert sum(1 for each in changes if each) == 3


@dataclass
class FakeBank:
    layer: LayerExperts
    slots: int
    usable_slots: int

    def shrink(self, slots: int) -> int:
        self.usable_slots -= slots
        return slots * self.layer.expert_bytes

    def grow(self, slots: int) -> int:
        self.usable_slots += slots
        return slots * self.layer.expert_bytes


def fake(slots: int, held: int | None = None, expert_mb: int = 1, top_k: int = 2) -> FakeBank:
    part = Part("up_proj", "weight", Path("x"), 0, expert_mb * MB, (1, 1), "F32")
    return FakeBank(LayerExperts(0, "mlp", 100, top_k, (part,)), slots, slots if held is None else held)


def test_slots_leave_the_banks_that_have_most_and_return_to_those_that_lack_most() -> None:
    banks = [fake(50), fake(20), fake(4, top_k=4)]
    assert adjust(banks, -30 * MB - 1) == -31 * MB
    assert [bank.usable_slots for bank in banks] == [27, 12, 4]
    assert adjust(banks, 10 * MB + 5) == 10 * MB
    assert [bank.usable_slots for bank in banks] == [35, 14, 4]
    assert adjust(banks, -500 * MB) == -45 * MB
    assert [bank.usable_slots for bank in banks] == [2, 2, 4]
    assert adjust(banks, 500 * MB) == 66 * MB
    assert [bank.usable_slots for bank in banks] == [50, 20, 4]


def test_growing_never_takes_more_than_there_is() -> None:
    banks = [fake(10, held=2, expert_mb=10), fake(10, held=5)]
    assert adjust(banks, 9 * MB) == 5 * MB
    assert adjust(banks, 9 * MB) == 0


def test_a_model_computes_the_same_while_its_banks_shrink_and_grow(tmp_path: Path) -> None:
    """With memory that is really given back: what was in those slots is read again."""
    import numpy as np
    from streamed_models import open_streamed, outputs

    model, streaming = open_streamed(write_mixture(tmp_path), lambda layer: layer.experts)
    try:
        prompt, decoded = list(range(3, 43)), [7, 99, 250]

        def logits() -> Any:
            return outputs(model, prompt, decoded)

        before = logits()
        planned = streaming.nbytes
        free = [0]
        spaces = (Space(0, 8000 * MB, 10 * MB),)
        streaming.pressure._read = lambda: Reading((replace(spaces[0], free_bytes=free[0]),))
        streaming.pressure._clock = lambda: free[0] / MB
        # 20 MB short, of 38.
        change = streaming.breathe()
        assert -21 * MB < change <= -0.9 * 20 * MB
        assert streaming.nbytes < planned
        assert streaming.given_back_bytes == planned - streaming.nbytes
        for got, expected in zip(logits()[1:], before[1:], strict=True):
            np.testing.assert_array_equal(got, expected)
        smaller = streaming.nbytes
        free[0] = 1000 * MB
        assert streaming.breathe() == planned - smaller
        assert streaming.nbytes == planned
        for got, expected in zip(logits()[1:], before[1:], strict=True):
            np.testing.assert_array_equal(got, expected)
    finally:
        streaming.close()


def test_marks_are_shares_with_a_floor() -> None:
    assert machine_space(1, 8_000 * MB).low_bytes == 160 * MB
    assert machine_space(1, 1_000 * MB).low_bytes == 64 * 2**20
    group = group_space(cgroup.Group(limit_bytes=8_000 * MB, used_bytes=7_000 * MB))
    assert (group.free_bytes, group.low_bytes) == (1_000 * MB, 80 * MB)
    assert group_space(cgroup.Group(100 * MB, 0)).low_bytes == 16 * 2**20


def test_this_machine_can_be_read() -> None:
    spaces = read().spaces
    assert 0 < spaces[0].free_bytes <= spaces[0].total_bytes


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="ascii")


def test_version_2_groups_and_those_around_them(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("0::/user/session\n", encoding="ascii")
    write(root, cgroup__procs="")
    write(root / "user", memory__max="4000\n", memory__current="3000\n", memory__stat="anon 9\nactive_file 100\n")
    write(
        root / "user" / "session",
        memory__max="max\n",
        memory__current="500\n",
        memory__stat="",
        memory__pressure="some avg10=12.50 avg60=0.00 avg300=0.00 total=7\nfull avg10=1.00 total=7\n",
    )
    assert cgroup.groups(root, membership) == (cgroup.Group(4000, 2900),)
    assert cgroup.stalled_share(root, membership) == 0.125
    (root / "user" / "session" / "memory.max").write_text("700\n", encoding="ascii")
    assert cgroup.limit_bytes(root, membership) == 700


def test_version_1_groups(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    membership.write_text("5:cpu,cpuacct:/\n4:memory:/job\n0::/\n", encoding="ascii")
    none = str(2**63 - 4096)
    write(root / "memory", memory__limit_in_bytes=none, memory__usage_in_bytes="9000")
    write(
        root / "memory" / "job",
        memory__limit_in_bytes="6000\n",
        memory__usage_in_bytes="5000\n",
        memory__stat="cache 4000\ntotal_inactive_file 1000\ntotal_active_file 500\n",
    )
    machine = tmp_path / "pressure"
    machine.write_text("some avg10=3.00 avg60=0.00 avg300=0.00 total=7\n", encoding="ascii")
    assert cgroup.groups(root, membership) == (cgroup.Group(6000, 3500),)
    assert cgroup.stalled_share(root, membership, machine) == 0.03


def test_a_container_sees_its_group_at_the_top(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "self"
    write(root, memory__max="5000", memory__current="100", memory__stat="")
    for path in ("/docker/0123456789", "/../other"):
        membership.write_text(f"0::{path}\n", encoding="ascii")
        assert cgroup.groups(root, membership) == (cgroup.Group(5000, 100),)


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    assert cgroup.groups(absent, absent) == ()
    assert cgroup.limit_bytes(absent, absent) is None
    assert cgroup.stalled_share(absent, absent, absent) is None


def test_a_machine_is_as_large_as_its_group_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.machine_bytes()
    monkeypatch.setattr(cgroup, "limit_bytes", lambda: whole // 4)
    assert memory.machine_bytes() == whole // 4
    assert memory.default_ceiling() == int(whole // 4 * memory.DEFAULT_SHARE)
    monkeypatch.setattr(cgroup, "limit_bytes", lambda: whole * 4)
    assert memory.machine_bytes() == whole
