"""Which earlier cache a prompt goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edger1.cache import Entry, PrefixCache, common_prefix


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


def test_common_prefix() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([], [1]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


def test_the_longest_shared_prefix_is_taken_and_trimmed() -> None:
    store = PrefixCache(10_000)
    store.put(entry([1, 2, 9]))
    store.put(entry([1, 2, 3, 4, 8]))
    caches, shared = store.take([1, 2, 3, 4, 5, 6])
    assert caches is not None
    assert (shared, caches[0].n) == (4, 4)
    # It was handed over: a second request finds the other one.
    assert store.take([1, 2, 3, 4, 5, 6])[1] == 2


def test_one_token_is_always_left_to_feed() -> None:
    store = PrefixCache(10_000)
    store.put(entry([1, 2, 3]))
    caches, shared = store.take([1, 2, 3])
    assert caches is not None
    assert (shared, caches[0].n) == (2, 2)


def test_a_long_conversation_is_not_robbed_by_a_short_prefix() -> None:
    store = PrefixCache(100_000)
    long = [1, 2, *range(100, 200)]
    store.put(entry(long))
    caches, shared = store.take([1, 2, 3, 4])
    assert caches is not None
    assert (shared, caches[0].n) == (2, 2)
    assert store.take([*long, 7])[1] == len(long)


def test_a_cache_that_cannot_be_trimmed_serves_only_what_continues_it() -> None:
    store = PrefixCache(10_000)
    store.put(entry([1, 2, 3], trimmable=False))
    assert store.take([1, 2, 4, 5]) == (None, 0)
    assert store.take([1, 2, 3, 4])[1] == 3


def test_the_budget_holds_and_the_oldest_goes_first() -> None:
    store = PrefixCache(budget_bytes=60)
    store.put(entry([1, 1, 1]))
    store.put(entry([2, 2, 2]))
    store.put(entry([3, 3]))
    assert store.nbytes == 50
    assert store.take([1, 1, 1, 1]) == (None, 0)
    store.put(entry(list(range(50))))
    assert store.nbytes == 0


def test_text_that_goes_on_keeps_the_tokens_that_were_written() -> None:
    store = PrefixCache(10_000)
    # The model wrote "ab" as two tokens; encoded afresh it would be one.
    store.put(entry([10, 11], "ab"))
    assert store.encode("abc", lambda text: [99] if text == "c" else [0]) == [10, 11, 99]
    assert store.encode("xabc", lambda _: [0]) == [0]


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
