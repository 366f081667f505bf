"""Measured read bandwidth of this machine: what weight bytes a second are held against.

    python -m benchmarks.bandwidth      # print what each way of reading gives

A small C program (bandwidth.c, compiled on the spot) streams a buffer far larger than the caches. Several ways of
reading are tried; the fastest one is the machine's bandwidth.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.peers import PeerMissingError, cache, run

SOURCE = Path(__file__).with_suffix(".c")
GIB = 1 << 30


class ReadBandwidth:
    """A buffer of `size_bytes` that `read` streams once with `threads` threads.

    `huge_pages` asks the system for them. Raises PeerMissingError without a C compiler.
    """

    def __init__(self, size_bytes: int, threads: int, *, streams: int = 4, huge_pages: bool = True) -> None:
        self._library = _library()
        self._size = size_bytes // (64 * threads) * (64 * threads)
        self._threads = threads
        self._streams = streams
        self._buffer = self._library.bandwidth_allocate(self._size, int(huge_pages))
        if not self._buffer:
            raise MemoryError(f"no {size_bytes} bytes for the bandwidth buffer")

    def read(self) -> float:
        """Read the buffer once and return bytes a second."""
        check = ctypes.c_uint64()
        seconds = self._library.bandwidth_read(
            self._buffer, self._size, self._threads, self._streams, ctypes.byref(check)
        )
        return self._size / seconds

    def close(self) -> None:
        """Give the buffer back."""
        if self._buffer:
            self._library.bandwidth_free(self._buffer, self._size)
            self._buffer = None


def fastest_way(size_bytes: int, threads: int) -> tuple[int, bool]:
    """Return (streams, huge pages) with which reading is fastest here, and print what each gave."""
    rates: dict[tuple[int, bool], float] = {}
    for huge_pages in (True, False):
        for streams in (1, 2, 4, 8):
            buffer = ReadBandwidth(size_bytes, threads, streams=streams, huge_pages=huge_pages)
            rates[streams, huge_pages] = statistics.median(buffer.read() for _ in range(5))
            buffer.close()
            print(
                f"  {threads} threads, {streams} streams each, huge pages {'on' if huge_pages else 'off'}: "
                f"{rates[streams, huge_pages] / 1e9:.1f} GB/s",
                file=sys.stderr,
                flush=True,
            )
    return max(rates, key=lambda way: rates[way])


def _library() -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise PeerMissingError("measuring memory bandwidth needs a C compiler (cc, gcc or clang), and none was found")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    built = cache() / f"bandwidth-{digest}.so"
    if not built.exists():
        partial = built.with_suffix(".partial")
        native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
        options = ["-O3", native, "-shared", "-fPIC", "-pthread", "-Wno-psabi"]
        run([compiler, *options, SOURCE, "-o", partial], "compiling bandwidth.c")
        partial.replace(built)
    library = ctypes.CDLL(str(built))
    library.bandwidth_allocate.restype = ctypes.c_void_p
    library.bandwidth_allocate.argtypes = [ctypes.c_size_t, ctypes.c_int]
    library.bandwidth_free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.bandwidth_read.restype = ctypes.c_double
    library.bandwidth_read.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_uint64),
    ]
    return library


if __name__ == "__main__":
    fastest_way(GIB, common.cores())
