"""What the system keeps of files in memory, seen through a memory map, and pages given back to it (Linux)."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE
_FAULT_AROUND = 64 << 10
"""Linux maps what lies around a touched page of a file as well, if it is in memory (fault_around_bytes)."""


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def address_of(mapped: mmap.mmap) -> int:
    """Return where a map begins in memory."""
    return int(np.frombuffer(mapped, np.uint8).ctypes.data)


def holds(address: int, nbytes: int) -> bool:
    """Say whether all of a range of a map is in memory already; False where the system does not tell."""
    if sys.platform != "linux" or nbytes <= 0:
        return False
    first = address // PAGE * PAGE
    pages = -(-(address + nbytes - first) // PAGE)
    one = ctypes.c_ubyte()
    # Mostly it is not there, which the first page tells.
    if _libc().mincore(first, PAGE, ctypes.byref(one)) != 0 or not one.value & 1:
        return False
    told = np.zeros(pages, np.uint8)
    if _libc().mincore(first, pages * PAGE, told.ctypes.data) != 0:
        return False
    return bool((told & 1).all())


def let_go(mapped: mmap.mmap, address: int, offset: int, nbytes: int) -> None:
    """Stop counting a range of a file's map, which begins at `address`, as this process's memory.

    The page cache keeps it. What was touched brought its neighbours along, in blocks of `_FAULT_AROUND`: they go too.
    """
    first = (address + offset) // _FAULT_AROUND * _FAULT_AROUND
    last = -(-(address + offset + nbytes) // _FAULT_AROUND) * _FAULT_AROUND
    # Never beyond the map: what lies there may be anybody's.
    first, last = max(first, address), min(last, address + len(mapped) // PAGE * PAGE)
    if last > first:
        _libc().madvise(first, last - first, mmap.MADV_DONTNEED)


def can_release() -> bool:
    """Say whether `release` ever gives anything back on this system."""
    return sys.platform == "linux"


def release(address: int, nbytes: int) -> int:
    """Give whole pages of anonymous memory back to the system, which reads as zeros after; return how many bytes."""
    if not can_release():
        return 0
    first = -(-address // PAGE) * PAGE
    last = (address + nbytes) // PAGE * PAGE
    if last <= first or _libc().madvise(first, last - first, mmap.MADV_DONTNEED) != 0:
        return 0
    return last - first
