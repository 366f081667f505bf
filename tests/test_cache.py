"""Which earlier cache a prompt goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edger1.cache import Entry, KVStore, common_prefix


class FakeCache:
    """Holds `n` tokens of 10 bytes each, as far as the store can see."""

    def __init__(self, n: int, trimmable: bool = True) -> None:
        self.n = n
        self._trimmable = trimmable

    @property
    def nbytes(self) -> int:
        return 10 * self.n

    def is_trimmable(self) -> bool:
        return self._trimmable

    def trim(self, n: int) -> int:
        self.n -= n
        return n


def entry(ids: list[int], text: str = "", **options: Any) -> Entry:
    return Entry(ids, text, [FakeCache(len(ids), **options)])


class Request:
    """A running request, as far as the store can see."""

    def __init__(self) -> None:
        self.gave_way = 0

    def give_way(self) -> None:
        self.gave_way += 1


def store_of(budget_bytes: int) -> KVStore:
    return KVStore(budget_bytes, lambda tokens: 10 * tokens)


def take(store: KVStore, ids: list[int]) -> tuple[list[Any] | None, int]:
    """Take, as a request does that is then gone with what it got."""
    request = Request()
    taken = store.take(request, ids)
    assert taken is not None
    store.release(request)
    return taken


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def test_the_longest_shared_prefix_is_taken_and_trimmed() -> None:
    store = store_of(10_000)
    store.put(entry([1, 2, 9]))
    store.put(entry([1, 2, 3, 4, 8]))
    caches, shared = take(store, [1, 2, 3, 4, 5, 6])
    assert caches is not None
    assert (shared, caches[0].n) == (4, 4)
    # It was a copy: a second request finds as much.
    assert take(store, [1, 2, 3, 4, 5, 6])[1] == 4


def test_where_there_is_no_room_for_a_copy_the_cache_itself_is_handed_over() -> None:
    store = store_of(110)
    store.put(entry([1, 2, 9]))
    store.put(entry([1, 2, 3, 4, 8]))
    request = Request()
    taken = store.take(request, [1, 2, 3, 4, 5])
    assert taken is not None
    assert taken[1] == 4
    # The other conversation is still there, and the one that goes on is not there twice.
    assert store.nbytes == 30 + 50
    assert take(store, [1, 2, 9, 7])[1] == 3


def test_one_token_is_always_left_to_feed() -> None:
    store = store_of(10_000)
    store.put(entry([1, 2, 3]))
    caches, shared = take(store, [1, 2, 3])
    assert caches is not None
    assert (shared, caches[0].n) == (2, 2)


def test_a_long_conversation_is_not_robbed_by_a_short_prefix() -> None:
    store = store_of(100_000)
    long = [1, 2, *range(100, 200)]
    store.put(entry(long))
    caches, shared = take(store, [1, 2, 3, 4])
    assert caches is not None
    assert (shared, caches[0].n) == (2, 2)
    assert take(store, [*long, 7])[1] == len(long)


def test_a_cache_that_cannot_be_trimmed_serves_only_what_continues_it() -> None:
    store = store_of(10_000)
    store.put(entry([1, 2, 3], trimmable=False))
    assert take(store, [1, 2, 4, 5]) == (None, 0)
    assert take(store, [1, 2, 3, 4])[1] == 3


def test_the_budget_holds_and_the_oldest_goes_first() -> None:
    store = store_of(60)
    store.put(entry([1, 1, 1]))
    store.put(entry([2, 2, 2]))
    store.put(entry([3, 3]))
    assert store.nbytes == 50
    assert take(store, [1, 1, 1, 1]) == (None, 0)
    store.put(entry(list(range(50))))
    assert store.nbytes == 0


def test_text_that_goes_on_keeps_the_tokens_that_were_written() -> None:
    store = store_of(10_000)
    # The model wrote "ab" as two tokens; encoded afresh it would be one.
    store.put(entry([10, 11], "ab"))
    assert store.encode("abc", lambda text: [99] if text == "c" else [0]) == [10, 11, 99]
    assert store.encode("xabc", lambda _: [0]) == [0]


def test_running_requests_push_out_what_is_only_kept() -> None:
    store = store_of(100)
    store.put(entry([1, 1, 1, 1]))
    store.put(entry([2, 2, 2, 2]))
    request = Request()
    assert store.hold(request, 5)
    assert store.nbytes == 90
    assert store.hold(request, 10)
    assert store.nbytes == 100
    store.release(request)
    assert store.nbytes == 0


def test_a_chat_that_fills_the_budget_keeps_its_own_cache() -> None:
    store = store_of(100)
    store.put(entry(list(range(9))))
    assert take(store, list(range(10)))[1] == 9


def test_the_younger_request_waits_and_the_older_one_never_does() -> None:
    store, older, younger = store_of(100), Request(), Request()
    assert store.hold(older, 4)
    assert store.hold(younger, 5)
    assert not store.hold(younger, 7)
    # The older one grows into the room of the younger one, which then stands back until the older one has ended.
    assert store.hold(older, 6)
    assert (older.gave_way, younger.gave_way) == (0, 1)
    assert not store.hold(younger, 1)
    assert store.take(younger, [1, 2]) is None
    store.release(older)
    assert store.hold(younger, 9)
    assert store.nbytes == 90


def test_a_request_of_the_whole_budget_is_served_alone() -> None:
    store, first, second = store_of(100), Request(), Request()
    assert store.hold(first, 10)
    assert not store.hold(second, 10)
    store.release(first)
    assert store.hold(second, 10)


def test_the_beginning_of_a_long_cache_does_not_keep_the_whole_of_it() -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    cache = KVCache()
    keys = mx.arange(1000, dtype=mx.float32)[None, None, :, None]
    cache.update_and_fetch(keys, -keys)
    store = KVStore(10**9, lambda tokens: tokens)
    store.put(Entry(list(range(1000)), "", [cache]))
    caches, shared = take(store, [0, 1, 2, 3, 4, 5000])
    assert caches is not None
    assert shared == 5
    # Room for what was asked, in the steps that caches grow by.
    assert caches[0].nbytes == 2 * 256 * 4
    assert caches[0].keys.flatten()[: caches[0].offset].tolist() == [0, 1, 2, 3, 4]
    # What the copy was taken from is whole.
    assert take(store, list(range(1001)))[0][0].values.flatten()[:1000].tolist() == (-keys).flatten().tolist()


@pytest.mark.model
def test_smollm2_prefills_only_the_second_turn(smollm2: Path) -> None:
    import edger1

    with edger1.load(smollm2, context=512) as model:
        chat = model.chat()
        first = chat.send("Hi", max_tokens=6, temperature=0)
        second = chat.send("Thanks", max_tokens=2, temperature=0)
    fed = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == fed
    # What the template puts between two answers, and the word itself: nothing of the first turn.
    assert second.usage.prefilled_tokens < 16


def test_what_was_drawn_and_not_fed_keeps_its_tokens() -> None:
    store = store_of(100)
    store.put(Entry([10, 11], "ab", [FakeCache(2)], drawn=[12], drawn_text="cd"))
    encode = {"ef": [99], "x": [98], "": [0]}.__getitem__
    assert store.encode("abcdef", encode) == [10, 11, 12, 99]
    assert store.encode("abcd", encode) == [10, 11, 12]
    assert store.encode("abx", encode) == [10, 11, 98]
    store.put(entry([1], "abcde"))
    store.put(entry([1]))
    assert store.texts() == ["abcde", "abcd"]
