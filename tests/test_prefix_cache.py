"""The tree of caches: what prompts share lies in memory once, and nobody gets a token that is not its own."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, QuantizedKVCache, RotatingKVCache

from edger1.cache import Entry, KVStore
from edger1.cache_parts import Part, divide, divisible, join
from edger1.prefix_cache import WORTH_TOKENS, PrefixCache
from edger1.token_tree import TokenTree, common_prefix

LAYERS = 2
BYTES = LAYERS * 2 * 4
"""Of one token in `caches_of`: keys and values of one float32 each."""


def caches_of(ids: list[int]) -> list[Any]:
    """Plain caches whose keys are the token ids, and whose values their negatives."""
    made = [KVCache() for _ in range(LAYERS)]
    for cache in made:
        keys = mx.array(ids, mx.float32)[None, None, :, None]
        cache.keys, cache.values, cache.offset = mx.contiguous(keys), mx.contiguous(-keys), len(ids)
    return made


def tokens_in(caches: list[Any]) -> list[int]:
    """Read the ids back, the same from every layer."""
    read = {tuple(a.flatten()[: c.offset].tolist()) for c in caches for a in (c.keys, -c.values)}
    assert len(read) == 1
    return [int(i) for i in read.pop()]


def always() -> bool:
    return True


def never() -> bool:
    return False


class Request:
    def give_way(self) -> None:
        raise AssertionError


SYSTEM = list(range(1000, 2000))


def conversation(number: int, length: int) -> list[int]:
    return [*SYSTEM, *range(number * 10_000, number * 10_000 + length)]


def test_what_conversations_begin_with_is_kept_once() -> None:
    kept = PrefixCache()
    for number in range(1, 6):
        kept.put(Entry(conversation(number, 100), "", caches_of(conversation(number, 100))))
    assert kept.nbytes == (1000 + 5 * 100) * BYTES
    for number in range(1, 6):
        asked = [*conversation(number, 100), 7]
        caches, shared = kept.take(asked, always)
        assert caches is not None
        assert (shared, tokens_in(caches)) == (1100, asked[:1100])
    caches, shared = kept.take([*SYSTEM, 5, 6], always)
    assert caches is not None
    assert (shared, tokens_in(caches)) == (1000, SYSTEM)


def test_three_conversations_take_turns_and_each_finds_all_of_its_own() -> None:
    store = KVStore(6000 * BYTES, lambda tokens: tokens * BYTES)
    length = dict.fromkeys((1, 2, 3), 0)
    for _ in range(4):
        for number in length:
            asked = conversation(number, length[number] + 50)
            request = Request()
            taken = store.take(request, asked)
            assert taken is not None
            caches, shared = taken
            # Of the first one nothing is known at first, of the others what the first has left.
            expected = 1000 + length[number] if length[number] else 1000 * (number > 1)
            assert shared == expected
            if caches is not None:
                assert tokens_in(caches) == asked[:shared]
            length[number] += 90
            ids = conversation(number, length[number])
            store.release(request)
            store.put(Entry(ids, "", caches_of(ids)))
            assert store.nbytes <= 6000 * BYTES
    assert store.nbytes == (1000 + 3 * 360) * BYTES


def test_a_short_common_beginning_is_not_worth_cutting_for() -> None:
    kept = PrefixCache()
    begin = list(range(WORTH_TOKENS - 1))
    first, second = [*begin, *range(100, 300)], [*begin, *range(400, 600)]
    kept.put(Entry(first, "", caches_of(first)))
    kept.put(Entry(second, "", caches_of(second)))
    assert kept.nbytes == (len(first) + len(second)) * BYTES
    for ids in (first, second):
        caches, shared = kept.take([*ids, 9], always)
        assert caches is not None
        assert (shared, tokens_in(caches)) == (len(ids), ids)


def test_the_least_recently_used_end_goes_first_and_the_beginning_stays() -> None:
    kept = PrefixCache()
    for number in (1, 2, 3):
        kept.put(Entry(conversation(number, 100), "", caches_of(conversation(number, 100))))
    kept.take([*conversation(1, 100), 7], always)
    assert kept.evict()
    found = {number: kept.take([*conversation(number, 100), 7], always)[1] for number in (1, 2, 3)}
    assert found == {1: 1100, 2: 1000, 3: 1100}
    assert kept.evict()
    assert kept.evict()
    assert kept.nbytes == 1000 * BYTES
    assert kept.evict()
    assert not kept.evict()
    assert kept.nbytes == 0


def test_without_room_the_end_of_a_conversation_is_handed_over_and_others_stay() -> None:
    kept = PrefixCache()
    for number in (1, 2):
        kept.put(Entry(conversation(number, 100), "", caches_of(conversation(number, 100))))
    fits = iter([False, True])
    caches, shared = kept.take([*conversation(1, 100), 7], lambda: next(fits))
    assert caches is not None
    assert (shared, tokens_in(caches)) == (1100, conversation(1, 100))
    assert kept.nbytes == 1100 * BYTES
    assert kept.take([*conversation(2, 100), 7], always)[1] == 1100


def test_without_any_room_everything_else_goes() -> None:
    kept = PrefixCache()
    for number in (1, 2):
        kept.put(Entry(conversation(number, 100), "", caches_of(conversation(number, 100))))
    asked = [*conversation(1, 40), 7, 8]
    caches, shared = kept.take(asked, never)
    assert caches is not None
    assert (shared, tokens_in(caches)) == (1040, asked[:1040])
    assert kept.nbytes == 0


def test_a_lone_conversation_that_fills_the_budget_is_never_copied() -> None:
    kept = PrefixCache()
    own = caches_of(SYSTEM)
    kept.put(Entry(SYSTEM, "", own))
    caches, shared = kept.take([*SYSTEM, 7], never)
    assert shared == 1000
    assert caches is not None
    assert [cache is mine for cache, mine in zip(caches, own, strict=True)] == [True, True]


def test_a_copy_and_what_it_was_made_from_do_not_see_each_other() -> None:
    kept = PrefixCache()
    kept.put(Entry(SYSTEM, "", caches_of(SYSTEM)))
    caches, _ = kept.take([*SYSTEM, 7], always)
    assert caches is not None
    for cache in caches:
        cache.trim(500)
        keys = mx.full((1, 1, 300, 1), -1.0)
        cache.update_and_fetch(keys, -keys)
    again, shared = kept.take([*SYSTEM, 7], always)
    assert again is not None
    assert (shared, tokens_in(again)) == (1000, SYSTEM)


@pytest.mark.parametrize("tokens", [120, 300, 6000])
def test_random_prompts_get_the_longest_beginning_and_no_wrong_token(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr("edger1.prefix_cache.WORTH_TOKENS", 3)
    rng = random.Random(tokens)
    budget = tokens * BYTES
    store = KVStore(budget, lambda n: n * BYTES)
    known: list[list[int]] = []
    for _ in range(300):
        base = rng.choice(known)[: rng.randrange(1, 80)] if known and rng.random() < 0.8 else []
        asked = [*base, *(rng.randrange(3) for _ in range(rng.randrange(1, 20)))]
        request = Request()
        taken = store.take(request, asked)
        assert taken is not None
        caches, shared = taken
        best = max((min(common_prefix(ids, asked), len(asked) - 1) for ids in known), default=0)
        assert shared == best if tokens > 5000 else shared <= best
        assert store.nbytes <= budget
        if caches is not None:
            assert tokens_in(caches) == asked[:shared]
        ids = [*asked, *(rng.randrange(3) for _ in range(rng.randrange(8)))]
        store.release(request)
        store.put(Entry(ids, "", caches_of(ids)))
        known.append(ids)
        assert store.nbytes <= budget
        held = [n.held for n in store._kept._tree.nodes() if n.held is not None]
        assert store.nbytes == sum(c.nbytes for h in held for c in h.all)
        assert all(n.children or n.held is not None for n in store._kept._tree.nodes())


def test_a_window_that_is_not_full_is_trimmed_and_one_that_is_serves_what_continues_it() -> None:
    def window(ids: list[int]) -> list[Any]:
        cache = RotatingKVCache(max_size=8)
        for i in ids:
            keys = mx.full((1, 1, 1, 1), float(i))
            cache.update_and_fetch(keys, -keys)
        return [cache, *caches_of(ids)[:1]]

    kept = PrefixCache()
    kept.put(Entry([1, 2, 3, 4, 5], "", window([1, 2, 3, 4, 5])))
    caches, shared = kept.take([1, 2, 3, 9, 9], always)
    assert caches is not None
    assert (shared, caches[0].offset, caches[1].offset) == (3, 3, 3)
    full = list(range(20))
    kept.put(Entry(full, "", window(full)))
    assert kept.take([*full[:15], 99, 98], always) == (None, 0)
    for _ in range(2):
        # A branch that goes on from there leaves the place to others.
        caches, shared = kept.take([*full, 99], always)
        assert caches is not None
        assert (shared, caches[0].offset) == (20, 20)


def test_states_of_a_fixed_size_serve_only_what_continues_them() -> None:
    state = ArraysCache(1)
    state[0] = mx.ones((1, 4))
    kept = PrefixCache()
    kept.put(Entry([1, 2, 3], "", [state]))
    assert kept.take([1, 2, 4, 5], always) == (None, 0)
    assert kept.take([1, 2, 3, 5], always)[1] == 3
    assert kept.take([1, 2, 3, 5], never)[1] == 3
    assert kept.take([1, 2, 3, 5], never) == (None, 0)


def test_quantized_caches_are_cut_and_joined_as_they_are() -> None:
    mx.random.seed(0)
    whole = QuantizedKVCache(group_size=32, bits=4)
    whole.update_and_fetch(mx.random.normal((1, 2, 50, 64)), mx.random.normal((1, 2, 50, 32)))
    keys, values = whole.keys_and_values()
    assert divisible([whole], 50)
    first, second = divide([whole], 17)
    assert (first[0].offset, second[0].offset) == (17, 33)
    joined = join([Part(first, 17, own=False), Part(second, 20, own=False)], 40)[0]
    assert (joined.offset, joined.bits, joined.group_size) == (37, 4, 32)
    for got, expected in zip(
        (*joined.keys_and_values()[0], *joined.keys_and_values()[1]), (*keys, *values), strict=True
    ):
        assert got.dtype == expected.dtype
        assert mx.array_equal(got, expected[..., :37, :]).item()


def test_the_wider_float_is_taken_where_parts_have_several() -> None:
    narrow, wide = caches_of([1, 2]), caches_of([3, 4])
    for cache in narrow:
        cache.keys, cache.values = cache.keys.astype(mx.float16), cache.values.astype(mx.float16)
    joined = join([Part(narrow, 2, own=False), Part(wide, 2, own=False)], 4)
    assert joined[0].keys.dtype == mx.float32
    assert tokens_in(joined) == [1, 2, 3, 4]


@pytest.mark.parametrize("heads", [1, 3])
def test_a_piece_keeps_nothing_of_the_rest(heads: int) -> None:
    cache = KVCache()
    cache.keys = mx.zeros((1, heads, 10_000, 64))
    cache.values = mx.zeros((1, heads, 10_000, 64))
    cache.offset = 10_000
    mx.eval(cache.keys, cache.values)
    whole = cache.nbytes
    before = mx.get_active_memory()
    caches = [cache]
    del cache
    first, _ = divide(caches, 100)
    del _
    assert mx.get_active_memory() - before < -whole + 2 * first[0].nbytes + 65536


def test_what_an_mtp_layer_knows_goes_along() -> None:
    from edger1.drafting.mtp import Kept

    def knows(ids: list[int]) -> Kept:
        return Kept(caches_of(ids)[0], None, len(ids))

    kept = PrefixCache()
    for number in (1, 2):
        ids = conversation(number, 100)
        kept.put(Entry(ids, "", [*caches_of(ids), knows(ids)]))
    for asked, shared in (([*conversation(1, 100), 7], 1100), ([*SYSTEM, 7], 1000)):
        caches, count = kept.take(asked, always)
        assert caches is not None
        assert count == shared
        assert isinstance(caches[-1], Kept)
        assert (caches[-1].end, caches[-1].cache.offset) == (shared, shared)
    caches, _ = kept.take([*conversation(1, 100), 7], never)
    assert caches is not None
    assert isinstance(caches[-1], Kept)
    # Of a longer text it knows what it knew of its beginning.
    ids = conversation(3, 200)
    kept.put(Entry(ids[:1100], "", [*caches_of(ids[:1100]), knows(ids[:1100])]))
    before = kept.nbytes
    kept.put(Entry(ids, "", [*caches_of(ids), knows(ids)]))
    assert kept.nbytes - before == 100 * BYTES + (1200 - 1100) * BYTES // LAYERS


def test_the_tree_has_a_node_for_each_place_where_sequences_part_or_end() -> None:
    tree: TokenTree[str, str] = TokenTree()

    def add(ids: list[int]) -> None:
        place = tree.walk(ids)
        node = tree.settle(place)
        if place.matched < len(ids):
            node = tree.add(node, ids[place.matched :])
        node.held = "x"

    for ids in ([1, 2, 3, 4], [1, 2, 5], [1, 2], [9]):
        add(ids)
    assert sorted((n.end, tuple(n.ids)) for n in tree.nodes()) == [(1, (9,)), (2, (1, 2)), (3, (5,)), (4, (3, 4))]
    assert (tree.walk([1, 2, 3, 7]).matched, tree.walk([8]).matched) == (3, 0)
    gone = tree.walk([1, 2, 5]).node
    gone.held = None
    tree.prune(gone)
    assert tree.walk([1, 2, 5]).matched == 2


def fed(caches: list[Any], ids: list[int]) -> list[Any]:
    """Feed ids to caches as a prompt is, in steps."""
    for first in range(0, len(ids), 512):
        keys = mx.array(ids[first : first + 512], mx.float32)[None, None, :, None]
        for cache in caches:
            cache.update_and_fetch(keys, -keys)
    mx.eval([cache.state for cache in caches])
    return caches


@pytest.mark.parametrize("windows", [0, 1])
@pytest.mark.parametrize(("length", "shared", "asked"), [(1000, 510, 511), (1000, 510, 600), (1000, 512, 1020)])
@pytest.mark.parametrize("fits", [always, never])
def test_what_is_handed_over_never_takes_more_than_its_request_has_set_aside(
    windows: int, length: int, shared: int, asked: int, fits: Any
) -> None:
    """The bound of `KVLayout.nbytes`: trimming alone keeps the buffers of what was longer."""
    kept = PrefixCache()
    made = [RotatingKVCache(4096) for _ in range(windows)] + [KVCache() for _ in range(LAYERS - windows)]
    kept.put(Entry(list(range(length)), "", fed(made, list(range(length)))))
    ids = [*range(shared), *range(10_000, 10_000 + asked - shared)]
    caches, found = kept.take(ids, fits)
    assert caches is not None
    assert (found, tokens_in(caches)) == (shared, ids[:shared])
    set_aside = (asked + 256) * BYTES
    assert sum(cache.nbytes for cache in caches) <= set_aside
    fed(caches, ids[shared:])
    assert tokens_in(caches) == ids
    assert sum(cache.nbytes for cache in caches) <= set_aside


def test_what_ends_at_a_step_and_has_room_behind_it_grows_by_no_more_than_a_step() -> None:
    """There mlx-lm's caches would add room to room."""
    ids = list(range(768))
    made = fed([KVCache() for _ in range(LAYERS)], ids[:700])
    for cache in made:
        # As where a token has been generated behind 700.
        cache.keys, cache.values = (a[..., :700, :] for a in (cache.keys, cache.values))
    for i in ids[700:]:
        fed(made, [i])
    kept = PrefixCache()
    kept.put(Entry(ids, "", made))
    asked = [*ids, *range(10_000, 10_300)]
    caches, shared = kept.take(asked, never)
    assert caches is not None
    assert shared == 768
    fed(caches, asked[768:])
    assert tokens_in(caches) == asked
    assert sum(cache.nbytes for cache in caches) <= (len(asked) + 256) * BYTES


def test_caches_that_a_layer_has_several_of_are_trimmed_as_well() -> None:
    kept = PrefixCache()
    ids = list(range(1000))
    kept.put(Entry(ids, "", [CacheList(*fed([KVCache(), KVCache()], ids))]))
    caches, shared = kept.take([*ids[:600], 7], never)
    assert caches is not None
    assert (shared, tokens_in(list(caches[0].caches))) == (600, ids[:600])
    assert caches[0].nbytes <= (601 + 256) * BYTES
