"""A pass that verifies drafts, as it is built before it is needed: while the one before it computes.

Where a model is small, building a pass takes Python as long as computing it takes the processor. So the next drafts and
the pass that verifies them are built in the expectation that all of this pass stands, and begun as soon as it is known
that it does. Until the pass is taken, the caches are as long as the text that is said; what it writes lies behind that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Keys = list[tuple[int, int]]
"""For each place to draw at the random key, and the state that follows."""


@dataclass
class Pass:
    """A pass over the last token of a text of `length` tokens, and `count` drafts of what follows.

    `drafts` (uint32, [count]) and `drawn` (uint32, [count + 1]), what the model says at their places and behind, are
    not read yet; `hidden` [1, count + 1, D] are its states there.
    """

    length: int
    count: int
    drafts: Any
    drawn: Any
    hidden: Any
    keys: Keys
    _held: list[tuple[Any, Any]] | None = None

    def lay_aside(self, caches: Sequence[Any]) -> None:
        """Let `caches`, which the pass was built on, end before its tokens again."""
        for cache in caches:
            cache.offset -= self.count + 1
        self._held = [(cache, cache.keys) for cache in caches]

    def resume(self, caches: Sequence[Any]) -> bool:
        """Let `caches` hold the pass's tokens; False, and nothing done, where they are no more what they were."""
        held = self._held or []
        if len(held) != len(caches) or any(
            cache is not own or cache.keys is not keys for cache, (own, keys) in zip(caches, held, strict=True)
        ):
            return False
        for cache in caches:
            cache.offset += self.count + 1
        # Whoever holds their arrays keeps the caches from being written in place.
        self._held = None
        return True


class Snapshot:
    """The arrays of KV caches, to be put back: of a pass that was built and is not computed nothing stays."""

    def __init__(self, caches: Sequence[Any]) -> None:
        self._taken = [(cache, cache.keys, cache.values, cache.offset) for cache in caches]

    def put_back(self) -> None:
        """Let the caches be what they were."""
        for cache, keys, values, offset in self._taken:
            cache.keys, cache.values, cache.offset = keys, values, offset


def buildable(caches: Sequence[Any], rows: int) -> bool:
    """Whether a pass over `rows` tokens can be built ahead: plain caches that have the room."""
    from mlx_lm.models.cache import KVCache

    return all(
        type(cache) is KVCache and cache.keys is not None and cache.offset + rows <= cache.keys.shape[2]
        for cache in caches
    )
