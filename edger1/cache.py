"""KV caches of earlier requests, kept so that a prompt which begins like one of them prefills only what is new.

The caches are mlx-lm's own. An entry remembers the token ids that are in it, and the text they stand for: a chat's
next prompt is the last one's text with something added, but encoding it afresh may cut the model's own words into
other tokens than it wrote. Where the text continues an entry, its ids are kept and only the rest is encoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Entry:
    """One kept cache: exactly `ids` have passed through the model; they decode to `text`."""

    ids: list[int]
    text: str
    caches: list[Any]

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays of all layers hold."""
        return sum(cache.nbytes for cache in self.caches)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix of two token sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class PrefixCache:
    """The most recently used caches of one model, under a byte budget."""

    def __init__(self, budget_bytes: int, max_entries: int = 4) -> None:
        self._entries: list[Entry] = []
        self._budget_bytes = budget_bytes
        self._max_entries = max_entries

    @property
    def nbytes(self) -> int:
        """Bytes held by all entries."""
        return sum(entry.nbytes for entry in self._entries)

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode a prompt, keeping the token ids of the longest entry that it continues."""
        best = max(
            (e for e in self._entries if e.text and text.startswith(e.text)),
            key=lambda e: len(e.ids),
            default=None,
        )
        if best is None:
            return encode(text)
        return best.ids + encode(text[len(best.text) :])

    def take(self, ids: list[int]) -> tuple[list[Any] | None, int]:
        """Hand over the cache that shares most of `ids`, trimmed to what is shared, and how many tokens that is.

        At least one token of `ids` is always left to feed. The entry leaves the store and its owner puts it back; where
        it would lose more than it gives (two conversations that share a system prompt), a copy is handed over instead.
        Returns (None, 0) where nothing useful is shared.
        """
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        best, shared = None, 0
        for entry in self._entries:
            n = min(common_prefix(entry.ids, ids), len(ids) - 1)
            if n > shared and (n == len(entry.ids) or can_trim_prompt_cache(entry.caches)):
                best, shared = entry, n
        if best is None:
            return None, 0
        surplus = len(best.ids) - shared
        if surplus > shared:
            caches = copy.deepcopy(best.caches)
        else:
            caches = best.caches
            self._entries.remove(best)
        if surplus:
            trim_prompt_cache(caches, surplus)
        return caches, shared

    def put(self, entry: Entry) -> None:
        """Keep a cache; the least recently used ones go while the store is over its budget."""
        self._entries.append(entry)
        while self._entries and (len(self._entries) > self._max_entries or self.nbytes > self._budget_bytes):
            self._entries.pop(0)

    def clear(self) -> None:
        """Drop every entry."""
        self._entries.clear()
