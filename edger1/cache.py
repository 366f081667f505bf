"""The KV caches of one model, under the byte budget that its plan gives them.

Those of running requests come first. Caches of earlier requests stay in what is left over, so that a prompt which
begins like one of them prefills only what is new. Where running requests outgrow the budget together, the younger
ones wait: a request that cannot begin or grow stands still, and the youngest gives up its cache, to compute it anew
when its elders have ended. The oldest always gets what it needs, so something always moves.

The caches are mlx-lm's own. An entry remembers the token ids that are in it, and the text they stand for: a chat's
next prompt is the last one's text with something added, but encoding it afresh may cut the model's own words into
other tokens than it wrote. Where the text continues an entry, its ids are kept and only the rest is encoded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar


@dataclass
class Entry:
    """One kept cache: exactly `ids` have passed through the model; they decode to `text`.

    `drawn` are the ids that the model had drawn to go on from there, `drawn_text` what they decode to.
    """

    ids: list[int]
    text: str
    caches: list[Any]
    drawn: list[int] = field(default_factory=list)
    drawn_text: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays of all layers hold."""
        return sum(cache.nbytes for cache in self.caches)


class Holder(Protocol):
    """A running request that has a cache."""

    def give_way(self) -> None:
        """Drop the cache; it is computed anew when `KVStore.hold` allows it."""


H = TypeVar("H", bound=Holder)


@dataclass
class _Hold:
    holder: Holder
    nbytes: int
    waits_for_elders: bool = False


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix of two token sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class KVStore:
    """Keeps caches of earlier requests and counts those of running ones, both within `budget_bytes`.

    `nbytes_of(n)` says how many bytes the buffers for n tokens take at most.
    """

    def __init__(self, budget_bytes: int, nbytes_of: Callable[[int], int], max_entries: int = 4) -> None:
        self._entries: list[Entry] = []
        self._holds: list[_Hold] = []
        self._budget_bytes = budget_bytes
        self._nbytes_of = nbytes_of
        self._max_entries = max_entries
        self.on_claim: Callable[[int], None] = lambda nbytes: None
        """Told of all bytes held and set aside whenever these became more, before anything is allocated."""

    @property
    def nbytes(self) -> int:
        """Bytes held by the entries and set aside for running requests."""
        return sum(entry.nbytes for entry in self._entries) + sum(hold.nbytes for hold in self._holds)

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode a prompt, keeping the token ids of the longest entry that it continues."""
        best = max(
            (e for e in self._entries if e.text and text.startswith(e.text)),
            key=lambda e: len(e.ids),
            default=None,
        )
        if best is None:
            return encode(text)
        ids, rest = best.ids, text[len(best.text) :]
        if best.drawn_text and rest.startswith(best.drawn_text):
            ids, rest = ids + best.drawn, rest[len(best.drawn_text) :]
        return ids + (encode(rest) if rest else [])

    def texts(self) -> list[str]:
        """Return what each entry stands for, as far as that is known, the longest first."""
        return sorted((e.text + e.drawn_text for e in self._entries if e.text), key=len, reverse=True)

    def hold(self, holder: Holder, tokens: int) -> bool:
        """Set aside room for a cache of `tokens` tokens; False means to wait and ask again.

        Entries are dropped for it, and holders younger than this one are told to give way.
        """
        if not self._reserve(holder, tokens):
            return False
        self._make_room(holder)
        return True

    def hold_together(self, tokens: dict[H, int]) -> list[H]:
        """Choose those whose caches, each padded to the longest of them, fit beside all else that runs; set that aside.

        `tokens` says how many each has alone. Shorter ones are chosen before longer ones; where not even two fit, none
        is. Nobody has to give way for it.
        """
        holds = {id(hold.holder): hold for hold in self._holds}
        # Who has to wait for older ones has no caches.
        tokens = {h: n for h, n in tokens.items() if id(h) in holds and not holds[id(h)].waits_for_elders}
        shortest = sorted(tokens, key=lambda holder: tokens[holder])
        alone = {id(holder): self._nbytes_of(n) for holder, n in tokens.items()}
        others = sum(hold.nbytes for hold in self._holds if id(hold.holder) not in alone)
        for count in range(len(shortest), 1, -1):
            padded = self._nbytes_of(tokens[shortest[count - 1]])
            rest = sum(alone[id(holder)] for holder in shortest[count:])
            if others + count * padded + rest <= self._budget_bytes:
                break
        else:
            count, padded = 0, 0
        for i, holder in enumerate(shortest):
            holds[id(holder)].nbytes = padded if i < count else alone[id(holder)]
        while self.nbytes > self._budget_bytes and self._entries:
            self._entries.pop(0)
        self.on_claim(self.nbytes)
        return shortest[:count]

    def take(self, holder: Holder, ids: list[int]) -> tuple[list[Any] | None, int] | None:
        """Set aside room for `ids`, and hand over the cache that shares most of them, trimmed to what is shared.

        Returns None where the holder must wait, else the caches and how many tokens are in them: (None, 0) where
        nothing useful is shared. At least one token of `ids` is always left to feed. The entry leaves the store and its
        owner puts it back; where it would lose more than it gives (two conversations that share a system prompt) and
        there is room, a copy is handed over instead.
        """
        if not self._reserve(holder, len(ids)):
            return None
        # What is handed over may be a copy.
        self.on_claim(self.nbytes)
        caches, shared = self._best(ids)
        self._make_room(holder)
        return caches, shared

    def settle(self, holder: Holder, tokens: int) -> None:
        """Give back what was set aside for `holder` beyond `tokens`: padding, once it is alone."""
        for hold in self._holds:
            if hold.holder is holder:
                hold.nbytes = min(hold.nbytes, self._nbytes_of(tokens))

    def release(self, holder: Holder) -> None:
        """Forget what was set aside for `holder`, which has ended."""
        self._holds = [hold for hold in self._holds if hold.holder is not holder]

    def put(self, entry: Entry) -> None:
        """Keep a cache; the least recently used ones go while the store is over its budget."""
        self._entries.append(entry)
        while self._entries and (len(self._entries) > self._max_entries or self.nbytes > self._budget_bytes):
            self._entries.pop(0)
        self.on_claim(self.nbytes)

    def clear(self) -> None:
        """Drop every entry."""
        self._entries.clear()

    def _reserve(self, holder: Holder, tokens: int) -> bool:
        nbytes = self._nbytes_of(tokens)
        mine = next((hold for hold in self._holds if hold.holder is holder), None)
        if mine is None:
            mine = _Hold(holder, 0)
            self._holds.append(mine)
        elders = self._holds[: self._holds.index(mine)]
        taken = sum(hold.nbytes for hold in elders)
        if nbytes > mine.nbytes and elders and (mine.waits_for_elders or taken + nbytes > self._budget_bytes):
            return False
        mine.nbytes = max(nbytes, mine.nbytes)
        mine.waits_for_elders = False
        return True

    def _make_room(self, holder: Holder) -> None:
        self._dismiss(holder)
        self.on_claim(self.nbytes)

    def _dismiss(self, holder: Holder) -> None:
        while self.nbytes > self._budget_bytes and self._entries:
            self._entries.pop(0)
        for hold in reversed(self._holds):
            if self.nbytes <= self._budget_bytes or hold.holder is holder:
                return
            if hold.nbytes:
                hold.holder.give_way()
                hold.nbytes = 0
                hold.waits_for_elders = True

    def _best(self, ids: list[int]) -> tuple[list[Any] | None, int]:
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        best, shared = None, 0
        for entry in self._entries:
            n = min(common_prefix(entry.ids, ids), len(ids) - 1)
            if n > shared and (n == len(entry.ids) or can_trim_prompt_cache(entry.caches)):
                best, shared = entry, n
        if best is None:
            return None, 0
        surplus = len(best.ids) - shared
        caches = best.caches
        if surplus > shared and self.nbytes <= self._budget_bytes:
            caches = copy.deepcopy(caches)
        else:
            self._entries.remove(best)
        if surplus:
            trim_prompt_cache(caches, surplus)
        if surplus > shared:
            _shrink(caches)
        return caches, shared


def _shrink(caches: list[Any]) -> None:
    """Free what trimming leaves behind: it keeps the whole buffers, for the sake of their beginnings."""
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    from edger1.packed_cache import PackedCache

    for cache in caches:
        if type(cache) is KVCache or isinstance(cache, PackedCache):
            cache.keys, cache.values = (mx.contiguous(a[..., : cache.offset, :]) for a in (cache.keys, cache.values))
            # A layer at a time: the sum of all beginnings beside all buffers could break the budget.
            mx.eval(cache.keys, cache.values)
