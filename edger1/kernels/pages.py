"""Weights on huge pages.

Decoding reads every weight once a token. With pages of 4 KB the processor spends part of that time on finding pages:
on two cores of a Sapphire Rapids machine, plain reading gives 16-20 GB/s from small pages and 30 from huge ones. Linux
gives huge pages to those who ask (`transparent_hugepage` at `madvise`, the usual setting); MLX does not ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from . import _load

HUGE_PAGE_BYTES = 2 << 20


def use_huge_pages(arrays: Iterable[mx.array]) -> int:
    """Move the memory of large evaluated arrays to huge pages; return how many bytes lie in them afterwards.

    Takes about as long as copying the arrays, and no more memory than one huge page at a time. What the system refuses
    (no free huge page, Linux before 6.1, `transparent_hugepage` at `never`) stays as it is. Values do not change.
    """
    extension = _load()[0]
    if extension is None:
        return 0
    return sum(extension.collapse_pages(a) for a in arrays if a.nbytes >= HUGE_PAGE_BYTES)


_SHARED_BYTES = 16 << 20
"""Arrays up to this size share an arena: of a larger one, all but its ends lies in huge pages of its own."""
_ARENA_BYTES = 32 << 20


class HugePages:
    """Puts the arrays of a model on huge pages as they are loaded, small ones side by side in arenas.

    `total_bytes` is what there is to come. An arena lives as long as any array in it: it is for weights that stay
    together.
    """

    def __init__(self, total_bytes: int) -> None:
        self._extension = _load()[0]
        self._arena: Any = None
        self._left = total_bytes

    def hold(self, a: mx.array) -> mx.array:
        """Return an evaluated array's values on huge pages, where the system has them: the array itself, or a copy."""
        if self._extension is None or a.nbytes == 0:
            return a
        left, self._left = self._left, self._left - a.nbytes
        if a.nbytes > _SHARED_BYTES:
            use_huge_pages([a])
            return a
        placed = self._arena.place(a) if self._arena is not None else None
        if placed is None:
            self._arena = self._extension.Arena(max(a.nbytes, min(left, _ARENA_BYTES)))
            placed = self._arena.place(a)
        return a if placed is None else placed
