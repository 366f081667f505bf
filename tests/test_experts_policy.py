"""Eviction policies: what each evicts, that none evicts what it must keep, and the bound they are held against."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1.experts import policy as policies
from edger1.experts import replay
from edger1.experts.policy import DEFAULT_POLICY, LFU, LRU, POLICIES, S3FIFO, Policy, Scored, Successor

Make = Callable[[int], Policy]
every_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


def followers(steps: int, experts: int = 32, top_k: int = 4, seed: int = 0) -> list[list[int]]:
    """Routing in which groups of experts follow each other: all equally popular, none repeated at once."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(experts).reshape(-1, top_k).tolist()
    made, at = [], 0
    for _ in range(steps):
        at = (at + 1) % len(groups) if rng.random() < 0.7 else int(rng.integers(len(groups)))
        made.append(groups[at])
    return made


def skewed(steps: int, experts: int = 32, top_k: int = 4, seed: int = 0) -> list[list[int]]:
    """Routing at random, by popularity alone."""
    rng = np.random.default_rng(seed)
    popularity = rng.permutation(1 / np.arange(1, experts + 1))
    popularity /= popularity.sum()
    return [rng.choice(experts, top_k, replace=False, p=popularity).tolist() for _ in range(steps)]


def brute_force(steps: list[list[int]], slots: int) -> int:
    """Fewest reads over every possible choice of victims."""

    @cache
    def fewest(time: int, held: frozenset[int]) -> int:
        if time == len(steps):
            return 0
        needed = frozenset(steps[time])
        others, missing = held - needed, len(needed - held)
        room = slots - len(needed)
        if len(others) <= room:
            return missing + fewest(time + 1, held | needed)
        left = itertools.combinations(sorted(others), room)
        return missing + min(fewest(time + 1, needed | frozenset(kept)) for kept in left)

    return fewest(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 3).flatmap(
        lambda top_k: st.tuples(
            st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=top_k, unique=True), min_size=1, max_size=9),
            st.integers(top_k, 5),
        )
    )
)
def test_the_bound_is_what_trying_everything_finds(case: tuple[list[list[int]], int]) -> None:
    steps, slots = case
    assert replay.fewest_misses(steps, slots) == brute_force(steps, slots)


@every_policy
def test_no_policy_beats_the_bound(make: Make) -> None:
    for steps in (followers(400), skewed(400)):
        for slots in (4, 8, 20):
            assert replay.misses(make(32), steps, slots) >= replay.fewest_misses(steps, slots)


@every_policy
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_victim_is_resident_and_not_kept(make: Make, data: st.DataObject) -> None:
    experts = 10
    some = st.lists(st.integers(0, experts - 1), unique=True)
    made = make(experts)
    if data.draw(st.booleans()):
        made.warm(data.draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts)))
    rng = np.random.default_rng(0)
    for _ in range(data.draw(st.integers(1, 40))):
        call = data.draw(some)
        made.use(call, rng.normal(size=experts).astype(np.float32) if data.draw(st.booleans()) else None)
        for _ in range(data.draw(st.integers(0, 3))):
            # Residents that were never used, and keeps beyond the call: prefetching and pinning.
            resident, keep = set(data.draw(some)), {*call, *data.draw(some)}
            victim = made.victim(resident, keep)
            assert (victim is None) == (resident <= keep)
            assert victim is None or victim in resident - keep


@every_policy
def test_every_victim_of_a_step_is_another_one(make: Make) -> None:
    made = make(16)
    for call in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]):
        made.use(call)
    held = set(range(12))
    made.use([12, 13, 14, 15])
    for new in (12, 13, 14, 15):
        victim = made.victim(held, {12, 13, 14, 15})
        assert victim is not None
        held.remove(victim)
        held.add(new)
    assert {12, 13, 14, 15} <= held
    assert len(held) == 12


def test_lru_evicts_what_was_not_used_for_longest_and_the_lower_rank_first() -> None:
    made = LRU(6)
    for call in ([0, 1], [2, 3], [1, 4]):
        made.use(call)
    assert made.victim({0, 1, 2, 3, 4}, set()) == 0
    assert made.victim({1, 2, 3, 4}, set()) == 3  # of [2, 3], the second choice
    assert made.victim({1, 2, 4}, {2}) == 4


def test_lfu_forgets() -> None:
    made = LFU(4, half_life=2)
    for _ in range(6):
        made.use([0])
    made.use([1])
    assert made.victim({0, 1}, set()) == 1
    for _ in range(6):
        made.use([2])
    made.use([1])
    assert made.victim({0, 1}, set()) == 0


def test_scores_count_where_uses_do_not_tell() -> None:
    scores = np.array([5.0, 1.0, 4.5, -3.0], np.float32)
    for shift, scale in ((0, 1), (10, 0.01)):  # whatever the scale that a router's scores are on
        made = Scored(4)
        made.use([0], scores * scale + shift)
        assert made.victim({1, 2, 3}, {0}) == 3
        assert made.victim({1, 2}, {0}) == 1


def test_s3_fifo_keeps_what_came_back() -> None:
    made = S3FIFO(8)
    held = {0, 1, 2, 3}
    made.use([0, 1, 2, 3])
    made.use([0])
    made.use([4])
    assert made.victim(held, {4}) == 1  # 0 came first but was used again
    held = {0, 2, 3, 4}
    made.use([1])  # gone a moment ago: it is remembered, and joins those that stay
    assert made.victim(held, {1}) == 2
    made.use([5])
    assert made.victim({0, 1, 3, 4}, {5}) == 3


@pytest.mark.parametrize("name", ["s3-fifo", "successor"])
def test_a_scan_does_not_push_out_what_is_in_use(name: str) -> None:
    made, working, held = POLICIES[name](64), [0, 1, 2, 3], set(range(16))
    for _ in range(50):
        made.use(working)
    for scanned in range(16, 64, 4):
        call = list(range(scanned, scanned + 4))
        made.use(call)
        for expert in call:
            victim = made.victim(held, set(call))
            assert victim is not None
            held.remove(victim)
            held.add(expert)
        made.use(working)
        assert set(working) <= held


@pytest.mark.parametrize("name", ["lfu", "scored", "successor"])
def test_one_prefill_over_all_experts_leaves_the_order_as_it_was(name: str) -> None:
    made = POLICIES[name](32)
    for step in skewed(400):
        made.use(step)
    popular = [e for e, _ in sorted(enumerate(np.bincount(np.ravel(skewed(400)))), key=lambda pair: -pair[1])[:4]]
    made.use(popular)
    made.use(list(range(32)))
    held = set(range(32))
    for _ in range(20):
        victim = made.victim(held, set())
        assert victim is not None
        held.remove(victim)
    assert set(popular) <= held


def test_successor_learns_who_follows_whom() -> None:
    steps = followers(1500)
    bound, lru, lfu, ours = (
        replay.fewest_misses(steps, 16),
        *(replay.misses(make(32), steps, 16) for make in (LRU, LFU, Successor)),
    )
    # All are equally popular and what was just used comes last: only the order of the groups tells.
    assert ours < lru - 0.4 * (lru - bound)
    assert ours < lfu - 0.4 * (lfu - bound)


def test_successor_learns_popularity() -> None:
    steps = skewed(1500)
    lru, ours = (replay.misses(make(32), steps, 16) for make in (LRU, Successor))
    assert ours < lru - 0.25 * (lru - replay.fewest_misses(steps, 16))


def test_successor_stays_finite_and_sane_whatever_comes() -> None:
    rng, made = np.random.default_rng(1), Successor(16)
    for _ in range(2000):
        made.use(rng.choice(16, rng.integers(0, 17), replace=False).tolist())
    for _ in range(500):
        made.use([3])
    made.use([5])
    assert np.isfinite(made._values()).all()
    assert made.victim(set(range(16)), set()) not in (3, 5)


def test_wide_calls_teach_nothing_but_are_seen() -> None:
    made = Successor(16)
    for _ in range(100):
        made.use(list(range(12)))
    assert np.array_equal(made._weights, Successor(16)._weights)
    assert made.victim(set(range(16)), set()) in range(12, 16)


@every_policy
def test_a_warm_start_keeps_the_popular(make: Make) -> None:
    counts = [7, 300, 1, 250, 0, 280, 2, 90]
    made = make(8)
    made.warm(counts)
    held = set(range(8))
    for _ in range(4):
        victim = made.victim(held, set())
        assert victim is not None
        held.remove(victim)
    assert held == {1, 3, 5, 7}


@every_policy
def test_a_warm_start_from_nothing_is_a_cold_one(make: Make) -> None:
    steps = skewed(100)
    warm = make(32)
    warm.warm([0] * 32)
    assert abs(replay.misses(warm, steps, 16) - replay.misses(make(32), steps, 16)) <= 8


def test_the_default_is_one_of_them() -> None:
    assert policies.POLICIES[DEFAULT_POLICY] is Successor


def test_a_replay_refuses_a_bank_smaller_than_a_step() -> None:
    with pytest.raises(ValueError, match="2 slots"):
        replay.misses(LRU(8), [[0, 1, 2]], 2)
