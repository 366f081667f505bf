"""Banks that make room when other programs need memory, and take it again when those are done.

The plan fixes what banks may take at most. While the model runs, what is free is looked at once a second: the machine's
available memory, and what the control groups around the process leave. Where that falls below a low mark, the banks
give back what brings it up to twice the mark; they grow again only when three times the mark are free, and never in the
seconds after giving. Between these nothing happens, so that banks do not swing with every program that comes and goes.

Where Linux tells that processes are waiting for memory, all marks are twice as high: reclaiming has become work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edger1 import cgroup
from edger1.experts.anatomy import LayerExperts
from edger1.experts.budget import least_slots

LOOK_S = 1.0
"""How often to look at most."""
CALM_S = 10.0
"""How long banks do not grow after they have given memory back."""
STALLED = 0.1
"""Share of time spent waiting for memory from which the marks are twice as high."""
_MIB = 2**20


@dataclass(frozen=True)
class Space:
    """Memory of which `free_bytes` are free of `total_bytes`; below `low_bytes` banks give back."""

    free_bytes: int
    total_bytes: int
    low_bytes: int


@dataclass(frozen=True)
class Reading:
    """What memory there is at a moment, and the share of time that was spent waiting for it (None: not known)."""

    spaces: tuple[Space, ...]
    stalled: float | None = None


@dataclass(frozen=True)
class Banks:
    """What the banks hold, what they were planned to hold, what they need at least, and the size of one expert."""

    held_bytes: int
    planned_bytes: int
    least_bytes: int
    expert_bytes: int


def decide(reading: Reading, banks: Banks, calm_s: float) -> int:
    """Return by how many bytes the banks should change now: below 0 what to give back, above 0 what they may take.

    `calm_s` is how long ago they gave back last. What is to be given back is at least one expert.
    """
    factor = 2 if reading.stalled is not None and reading.stalled > STALLED else 1
    marks = [(space.free_bytes, factor * space.low_bytes) for space in reading.spaces]
    short = max((2 * low - free for free, low in marks if free < low), default=0)
    if short > 0:
        return -min(max(short, banks.expert_bytes), max(0, banks.held_bytes - banks.least_bytes))
    spare = min((free - 3 * low for free, low in marks), default=0)
    growth = min(spare, banks.planned_bytes - banks.held_bytes)
    return growth if calm_s >= CALM_S and growth >= banks.expert_bytes else 0


class Slots(Protocol):
    """A bank, as far as its size matters: `edger1.experts.bank.Bank`."""

    layer: LayerExperts
    slots: int

    @property
    def usable_slots(self) -> int:
        """Slots whose memory it holds."""

    def shrink(self, slots: int) -> int:
        """Give the memory of slots back; returns the bytes."""

    def grow(self, slots: int) -> int:
        """Take memory for slots again; returns the bytes."""


def adjust(banks: Sequence[Slots], change_bytes: int, *, in_turns: bool = False) -> int:
    """Shrink banks by at least as many bytes as `change_bytes` is below 0, or grow them by at most as many above.

    Slot by slot: from the bank that has most beyond its fewest, or to the one that lacks most, as shares of what was
    planned. Returns the bytes that came of it, below 0 where they were given back. See `least_slots` for `in_turns`.
    """
    sizes = [bank.usable_slots for bank in banks]

    def ahead(i: int) -> float:
        return (sizes[i] - least_slots(banks[i].layer, in_turns=in_turns)) / banks[i].slots

    if change_bytes < 0:
        while change_bytes < 0:
            i = max(range(len(banks)), key=ahead)
            if ahead(i) <= 0:
                break
            sizes[i] -= 1
            change_bytes += banks[i].layer.expert_bytes
    else:
        while True:
            fitting = [i for i, b in enumerate(banks) if sizes[i] < b.slots and b.layer.expert_bytes <= change_bytes]
            if not fitting:
                break
            i = min(fitting, key=lambda i: sizes[i] / banks[i].slots)
            sizes[i] += 1
            change_bytes -= banks[i].layer.expert_bytes
    changed = 0
    for bank, size in zip(banks, sizes, strict=True):
        if size < bank.usable_slots:
            changed -= bank.shrink(bank.usable_slots - size)
        elif size > bank.usable_slots:
            changed += bank.grow(size - bank.usable_slots)
    return changed


def read() -> Reading:
    """Look at the machine and at the control groups around this process."""
    import psutil

    machine = psutil.virtual_memory()
    spaces = [machine_space(int(machine.available), int(machine.total))]
    spaces += [group_space(group) for group in cgroup.groups()]
    return Reading(tuple(spaces), cgroup.stalled_share())


def free_bytes() -> int:
    """Return what is free at the moment, of the machine's memory and within all limits around this process."""
    return min(space.free_bytes for space in read().spaces)


def machine_space(available_bytes: int, total_bytes: int) -> Space:
    """Return the machine's memory with its mark: 2% of it, where others start to suffer, and 64 MiB at least."""
    return Space(available_bytes, total_bytes, max(total_bytes // 50, 64 * _MIB))


def group_space(group: cgroup.Group) -> Space:
    """Return what a control group leaves, with its mark: 1%, and 16 MiB at least.

    That is less than of the machine's: the plan has seen to it that the process itself fits, and beyond the limit it
    would be killed.
    """
    return Space(group.limit_bytes - group.used_bytes, group.limit_bytes, max(group.limit_bytes // 100, 16 * _MIB))


class Pressure:
    """Asks once a second what the banks should do; asking more often costs a look at the clock."""

    def __init__(
        self,
        planned_bytes: int,
        least_bytes: int,
        expert_bytes: int,
        *,
        read: Callable[[], Reading] = read,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.planned_bytes = planned_bytes
        """What the banks may hold at most."""
        self.least_bytes, self._expert = least_bytes, expert_bytes
        self._read, self._clock = read, clock
        self._looked = self._gave = float("-inf")

    def change_bytes(self, held_bytes: int) -> int:
        """Return by how many bytes banks that hold `held_bytes` should change now; 0 nearly always. See `decide`."""
        now = self._clock()
        if now - self._looked < LOOK_S:
            return 0
        self._looked = now
        banks = Banks(held_bytes, self.planned_bytes, self.least_bytes, self._expert)
        change = decide(self._read(), banks, now - self._gave)
        if change < 0:
            self._gave = now
        return change
