"""Whether the system's page cache holds a range of a mapped file (Linux's mincore)."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import numpy as np

PAGE = mmap.PAGESIZE


@cache
def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library


def holds(mapped: mmap.mmap, offset: int, nbytes: int) -> bool:
    """Say whether all of a range of a mapped file is in memory; False where the system does not tell."""
    if sys.platform != "linux" or nbytes <= 0:
        return False
    first = offset // PAGE * PAGE
    pages = -(-(offset + nbytes - first) // PAGE)
    told = np.zeros(pages, np.uint8)
    start = np.frombuffer(mapped, np.uint8).ctypes.data
    if _libc().mincore(start + first, pages * PAGE, told.ctypes.data) != 0:
        return False
    return bool((told & 1).all())


def release(address: int, nbytes: int) -> int:
    """Give whole pages of anonymous memory back to the system, which reads as zeros after; return how many bytes."""
    if sys.platform != "linux":
        return 0
    first = -(-address // PAGE) * PAGE
    last = (address + nbytes) // PAGE * PAGE
    if last <= first or _libc().madvise(first, last - first, mmap.MADV_DONTNEED) != 0:
        return 0
    return last - first
