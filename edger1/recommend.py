"""Which models to begin with on a machine: a short list by memory and by what a token reads, from the registry alone.

A model's worth is taken to grow with its parameters, of a mixture of experts with the geometric mean of all and active
ones, and to be less by half where it does not reason. Among those that are ready to run and fast enough, the list has
the smallest that is good for a conversation, the best that fits into memory, and the best that streams its experts from
disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edger1 import estimate
from edger1.estimate import Estimate, Machine
from edger1.memory import DEFAULT_SHARE
from edger1.registry import Entry, HubSource, WheelSource
from edger1.units import format_bytes

Role = Literal["small", "fits", "streams"]

NETWORK_BYTES_PER_S = 12.5e6
"""The connection that download times are told for: 100 Mbit/s."""
# What reading weights allows, on a Mac and on a computer without such memory; and an SSD.
_GPU_BYTES_PER_S, _CPU_BYTES_PER_S, _DISK_BYTES_PER_S = 100e9, 10e9, 1.5e9
_LEAST_TOKENS_PER_S = {"small": 2.0, "fits": 2.0, "streams": 0.5}
_GOOD_FROM = 1.2e9
"""Parameters from which a small model holds a conversation."""
# A registry entry of more bytes a parameter is not quantized yet.
_READY_BYTES_PER_PARAMETER = 1.2


@dataclass(frozen=True)
class Recommendation:
    """A model to begin with, why, and what fetching it takes."""

    entry: Entry
    role: Role
    estimate: Estimate
    tokens_per_s: float
    """What reading weights and experts allows on a machine of this kind, at most."""
    why: str

    @property
    def download_s(self) -> float | None:
        """Seconds that fetching takes at 100 Mbit/s."""
        return self.entry.bytes / NETWORK_BYTES_PER_S if self.entry.bytes else None


def recommend(
    entries: Iterable[Entry],
    memory_bytes: int,
    *,
    ceiling_bytes: int | None = None,
    context: int | None = None,
    machine: Machine | None = None,
) -> list[Recommendation]:
    """Return up to three models for a machine with `memory_bytes`, the one to take first; none twice.

    The best that fits comes first, then the best that streams, then the smallest. On a machine too small for any good
    model it is the largest one that fits, and nothing where none does.
    """
    machine = machine or Machine.this()
    ceiling = ceiling_bytes or int(memory_bytes * DEFAULT_SHARE)
    found = [(entry, estimate.of_entry(entry, ceiling, context, machine)) for entry in entries if _is_ready(entry)]
    able = [(entry, about, _speed(about, machine)) for entry, about in found if about.fit in ("fits", "streams")]
    fitting = [each for each in able if each[1].fit == "fits"]
    chosen: list[Recommendation] = []

    def add(role: Role, candidates: list[tuple[Entry, Estimate, float]]) -> None:
        taken = {each.entry.alias for each in chosen}
        left = [c for c in candidates if c[0].alias not in taken and c[2] >= _LEAST_TOKENS_PER_S[role]]
        if not left:
            return
        if role == "small":
            entry, about, speed = min(left, key=lambda each: (each[0].bytes or 0, -_worth(each[0])))
        else:
            entry, about, speed = max(left, key=lambda each: (_worth(each[0]), -(each[0].bytes or 0)))
        chosen.append(Recommendation(entry, role, about, speed, _why(role, entry, about)))

    add("fits", fitting)
    best = _worth(chosen[0].entry) if chosen else 0.0
    add("streams", [each for each in able if each[1].fit == "streams" and _worth(each[0]) > best])
    add("small", [each for each in fitting if _worth(each[0]) >= _GOOD_FROM and _worth(each[0]) < best])
    return chosen


def _is_ready(entry: Entry) -> bool:
    """Tell whether a model can be fetched and talked to as it is."""
    if not entry.bytes or not entry.parameters or not isinstance(entry.sources[0], HubSource | WheelSource):
        return False
    base = "base model" in (entry.description or "")
    return not base and entry.bytes / entry.parameters <= _READY_BYTES_PER_PARAMETER


def _worth(entry: Entry) -> float:
    size = math.sqrt((entry.parameters or 0) * (entry.active_parameters or entry.parameters or 0))
    return size if entry.thinking is not None else size / 2


def _speed(about: Estimate, machine: Machine) -> float:
    weights = _GPU_BYTES_PER_S if machine.gpu else _CPU_BYTES_PER_S
    seconds = (about.read_bytes or 0) / weights + (about.missed_bytes or 0) / _DISK_BYTES_PER_S
    return 1 / max(seconds, 1e-6)


def _why(role: Role, entry: Entry, about: Estimate) -> str:
    active = entry.active_parameters is not None and entry.active_parameters < (entry.parameters or 0)
    if role == "streams":
        share = f"about {about.experts_share:.0%} of its experts stay in memory" if about.experts_share else "few stay"
        return f"Larger than memory: {share}, the others come from disk. Slower, and knows more."
    if role == "small":
        return "Quick to fetch and to answer; good for a first look."
    if active:
        return f"The best that fits: a mixture of experts, a token reads {format_bytes(about.read_bytes or 0)} of it."
    return "The best that fits whole into memory and answers at a usable speed."
