"""Playing one layer's routing through a bank: how many reads a policy needs, and how few would do.

A bank starts empty. Each step needs all its experts at once: those that are missing are read, each into a free slot or
into that of a victim, which may be none of the step's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from edger1.experts.policy import Policy


def misses(
    policy: Policy,
    steps: Sequence[Sequence[int]],
    slots: int,
    scores: Iterable[np.ndarray] | None = None,
    resident: Iterable[int] = (),
) -> int:
    """Return how many experts are read. `resident` is what the bank holds before the first step.

    Raises ValueError where a step needs more experts than there are slots, or the policy gives up what it may not.
    """
    held = set(resident)
    rows = iter(scores) if scores is not None else None
    read = 0
    for step in steps:
        policy.use(step, next(rows) if rows is not None else None)
        needed = set(step)
        for expert in step:
            if expert in held:
                continue
            read += 1
            if len(held) >= slots:
                victim = policy.victim(held, needed)
                if victim is None or victim in needed or victim not in held:
                    raise ValueError(f"step {list(step)} with {slots} slots: the policy gave up {victim}")
                held.remove(victim)
            held.add(expert)
    return read


def fewest_misses(steps: Sequence[Sequence[int]], slots: int) -> int:
    """Return how few reads any policy can do with that knows the future: Belady's MIN with a set for each step.

    Evicting the expert whose next use lies farthest ahead stays optimal when a step needs several at once: the step's
    own experts must all stay, and of two others the one used sooner is never the better victim.
    """
    never = len(steps)
    upcoming: dict[int, list[int]] = {}
    for time in range(len(steps) - 1, -1, -1):
        for expert in steps[time]:
            upcoming.setdefault(expert, []).append(time)
    held: set[int] = set()
    read = 0
    for step in steps:
        needed = set(step)
        for expert in step:
            upcoming[expert].pop()
        for expert in step:
            if expert in held:
                continue
            read += 1
            if len(held) >= slots:
                others = held - needed
                held.remove(max(others, key=lambda other: upcoming[other][-1] if upcoming[other] else never))
            held.add(expert)
    return read
