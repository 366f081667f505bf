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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from edger1.prefix_cache import Entry, PrefixCache
from edger1.token_tree import common_prefix

__all__ = ["Entry", "Holder", "KVStore", "common_prefix"]


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


class KVStore:
    """Keeps caches of earlier requests and counts those of running ones, both within `budget_bytes`.

    `nbytes_of(n)` says how many bytes the buffers for n tokens take at most.
    """

    def __init__(self, budget_bytes: int, nbytes_of: Callable[[int], int]) -> None:
        self._kept = PrefixCache()
        self._holds: list[_Hold] = []
        self._budget_bytes = budget_bytes
        self._nbytes_of = nbytes_of
        self.on_claim: Callable[[int], None] = lambda nbytes: None
        """Told of all bytes held and set aside whenever these became more, before anything is allocated."""

    @property
    def budget_bytes(self) -> int:
        """Bytes that all of it may take."""
        return self._budget_bytes

    @property
    def nbytes(self) -> int:
        """Bytes held by caches of earlier requests and set aside for running ones."""
        return self._kept.nbytes + sum(hold.nbytes for hold in self._holds)

    def encode(self, text: str, encode: Callable[[str], list[int]]) -> list[int]:
        """Encode a prompt, keeping the token ids of the longest entry that it continues."""
        marks = self._kept.marks()
        best = max((m for m in marks if text.startswith(m.text)), key=lambda m: len(m.ids), default=None)
        if best is None:
            return encode(text)
        ids, rest = best.ids, text[len(best.text) :]
        if best.drawn_text and rest.startswith(best.drawn_text):
            ids, rest = ids + best.drawn, rest[len(best.drawn_text) :]
        return ids + (encode(rest) if rest else [])

    def texts(self) -> list[str]:
        """Return what each entry stands for, as far as that is known, the longest first."""
        return sorted((m.text + m.drawn_text for m in self._kept.marks()), key=len, reverse=True)

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
        self._evict()
        self.on_claim(self.nbytes)
        return shortest[:count]

    def take(self, holder: Holder, ids: list[int]) -> tuple[list[Any] | None, int] | None:
        """Set aside room for `ids`, and hand over a cache of what earlier requests share of them.

        Returns None where the holder must wait, else the caches and how many tokens are in them: (None, 0) where
        nothing useful is shared. At least one token of `ids` is always left to feed. As long as there is room, what is
        handed over is a copy; else the kept cache itself, which its new owner puts back.
        """
        if not self._reserve(holder, len(ids)):
            return None
        # What is handed over may be a copy.
        self.on_claim(self.nbytes)
        caches, shared = self._kept.take(ids, lambda: self.nbytes <= self._budget_bytes)
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
        """Keep a cache, which is the store's from now on; what was used least recently goes while that is too much."""
        self._kept.put(entry)
        self._evict()
        self.on_claim(self.nbytes)

    def clear(self) -> None:
        """Drop every cache of earlier requests."""
        self._kept.clear()

    def _evict(self) -> None:
        while self.nbytes > self._budget_bytes and self._kept.evict():
            pass

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
        self._evict()
        for hold in reversed(self._holds):
            if self.nbytes <= self._budget_bytes or hold.holder is holder:
                return
            if hold.nbytes:
                hold.holder.give_way()
                hold.nbytes = 0
                hold.waits_for_elders = True
