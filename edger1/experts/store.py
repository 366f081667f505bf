"""Reads experts from a model's files, in threads, straight into the memory where they will be used.

A read that somebody waits for goes before one that was made on a guess. Where memory is tight direct I/O spares the
copy through the page cache, most of the processor's time, and the memory that the cache would take from the limit.
Where there is plenty beside what the model was given, reads are buffered: what was read once is then in memory, though
it is nobody's, and is computed where it lies the next time.

Files may change beneath a running program. Each read looks at the file's size and time of change before and after: what
was read from another file than the one that was loaded is an error, and never becomes a token.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edger1.errors import StreamError
from edger1.experts import page_cache
from edger1.experts.anatomy import LayerExperts, Part

Bytes = npt.NDArray[np.uint8]

THREADS = 4
"""Reads under way at once: on the disks that were measured more bring nothing."""
DIRECT_BLOCK = 4096
"""Direct reads begin and end at a multiple of so many bytes, in the file and in memory."""
_HUGE = 2 << 20
_HUGE_FROM = 128 << 10
"""Parts from this size on are read through huge pages. A direct read goes to the disk as a list of pieces of memory, a
piece for each page: with 4 KB pages a part of 0.9 MB is 216 pieces, and some disks (virtual ones above all) spend their
time on those; through huge pages the same disk was read four times as fast."""
_PLENTY = 0.5
"""Share of the model's files for which there must be free memory."""
_SMALL = 64 << 10
"""Parts up to this size are read by the thread that reads the part before them."""


class Read:
    """One expert on its way from disk."""

    def __init__(self, layer: LayerExperts, expert: int, pieces: int, *, guessed: bool) -> None:
        self.layer, self.expert = layer, expert
        self.guessed = guessed
        """Whether nobody has asked for it yet."""
        self.error: BaseException | None = None
        self._left = pieces
        self._done = threading.Event()
        self._over = False
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: list[Callable[[Read], None]] = []

    @classmethod
    def over(cls, layer: LayerExperts, expert: int) -> Read:
        """Return a read that has ended well."""
        read = cls(layer, expert, 0, guessed=False)
        read._over = True
        read._done.set()
        return read

    @property
    def done(self) -> bool:
        """Whether it has ended, and who asked for that was told: the bytes are there, or `error` says why not."""
        return self._done.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether it was given up before its bytes were there."""
        return self._cancelled

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for its end; False where that did not come in time."""
        return self._done.wait(timeout_s)

    def then(self, callback: Callable[[Read], None]) -> None:
        """Call `callback` when it has ended, from a reading thread, or at once where it has."""
        with self._lock:
            if not self._over:
                self._callbacks.append(callback)
                return
        callback(self)

    def cancel(self) -> None:
        """Give it up; pieces that are being read are read to their end."""
        self._cancelled = True

    def finish_piece(self, error: BaseException | None) -> None:
        """Note that a piece has been read, or why not."""
        with self._lock:
            self._left -= 1
            self.error = self.error or error
            if self._left:
                return
            self._over = True
            callbacks, self._callbacks = self._callbacks, []
        try:
            for callback in callbacks:
                callback(self)
        finally:
            # Last: who sees that it is done may have its memory filled anew, and is not to be told of this one then.
            self._done.set()


@dataclass(frozen=True)
class _Identity:
    """What a file was when the model was loaded."""

    size: int
    changed_ns: int

    @classmethod
    def of(cls, descriptor: int) -> _Identity:
        about = os.fstat(descriptor)
        return cls(about.st_size, about.st_mtime_ns)


@dataclass
class _File:
    path: Path
    buffered: int
    direct: int | None
    identity: _Identity
    map: mmap.mmap | None = field(default=None, repr=False)
    address: int = 0
    """Where the map begins."""
    guard: Any = field(default=None, repr=False)
    """The kernels' `MapGuard`, without which nothing is computed on the map."""

    def check(self) -> None:
        found = _Identity.of(self.buffered)
        if found != self.identity:
            what = "changed" if found.size == self.identity.size else f"now has {found.size:,} bytes"
            raise StreamError(
                f"{self.path} {what} while the model was in use ({self.identity.size:,} bytes when it was loaded). "
                f"Load the model again."
            )


@dataclass
class Counts:
    """What a store has read so far."""

    nbytes: int = 0
    busy_s: float = 0.0
    """Seconds that threads spent reading, added up."""


_Piece = tuple[Read, tuple[tuple[Part, Any], ...]]


class Store:
    """The experts of a model on disk. `mode` is auto, direct or buffered; see the module for what auto does."""

    def __init__(self, layers: Sequence[LayerExperts], *, mode: str = "auto", threads: int = THREADS) -> None:
        self.mode = mode
        self.plenty = False
        """Whether there is memory for the page cache to keep a good part of what is read; in mode auto."""
        self.counts = Counts()
        self._files: dict[Path, _File] = {}
        try:
            for path in {part.file for layer in layers for part in layer.parts}:
                self._files[path] = _open(path, mode)
        except BaseException:
            self._close_files()
            raise
        self._largest = max((part.nbytes for layer in layers for part in layer.parts), default=0)
        self._wanted: collections.deque[_Piece] = collections.deque()
        self._guessed: collections.deque[_Piece] = collections.deque()
        self._ready = threading.Condition()
        self._counting = threading.Lock()
        self._closed = False
        # Daemons: one that hangs in a dead disk must not keep the program from ending.
        self._threads = [
            threading.Thread(target=self._serve, name="edger1-reader", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def look_for_plenty(self, free_bytes: int) -> None:
        """Decide how to read by what is free, in bytes, beside all that the model holds."""
        self.plenty = free_bytes >= _PLENTY * sum(file.identity.size for file in self._files.values())

    def read(self, layer: LayerExperts, expert: int, into: Sequence[Bytes], *, guessed: bool = False) -> Read:
        """Begin to read an expert; part i of the layer goes to `into[i]`, uint8 [nbytes] without gaps."""
        pieces = _pieces(layer, into)
        read = Read(layer, expert, len(pieces), guessed=guessed)
        with self._ready:
            if self._closed:
                raise StreamError("The model was closed while an expert was being asked for.")
            (self._guessed if guessed else self._wanted).extend((read, piece) for piece in pieces)
            self._ready.notify(len(pieces))
        return read

    def hurry(self, read: Read) -> None:
        """Let a read that was made on a guess go before others of its kind: somebody waits for it."""
        read.guessed = False
        with self._ready:
            mine = [piece for piece in self._guessed if piece[0] is read]
            if mine:
                self._guessed = collections.deque(piece for piece in self._guessed if piece[0] is not read)
                self._wanted.extend(mine)

    def maps(self, layer: LayerExperts, extension: Any) -> dict[tuple[str, str], list[memoryview]] | None:
        """Return for each part of a layer a buffer for each expert, on a map of its file; None where there are no maps.

        `extension` is the kernels'. It sees to it that a file which is cut short does not end the process; where it
        cannot, for more files than it keeps an eye on, nothing is computed on maps.
        """
        files = [self._files[part.file] for part in layer.parts]
        if any(file.map is None for file in files):
            return None
        found = {}
        for part, file in zip(layer.parts, files, strict=True):
            try:
                file.guard = file.guard or extension.MapGuard(file.map)
            except RuntimeError:
                return None
            whole = memoryview(file.map)[part.offset : part.offset + layer.experts * part.nbytes]  # type: ignore[arg-type]
            experts = [whole[e * part.nbytes : (e + 1) * part.nbytes] for e in range(layer.experts)]
            found[part.projection, part.name] = experts
        return found

    def holds(self, layer: LayerExperts, expert: int) -> bool:
        """Whether the page cache has all of an expert. Raises StreamError where its file has changed."""
        for part in layer.parts:
            file = self._files[part.file]
            file.check()
            if not _cached(file, part.offset + expert * part.nbytes, part.nbytes):
                return False
        return True

    def let_go(self, layer: LayerExperts, expert: int) -> None:
        """Stop counting what was read of an expert on its map as this process's memory."""
        for part in layer.parts:
            file = self._files[part.file]
            if file.map is not None:
                page_cache.let_go(file.map, file.address, part.offset + expert * part.nbytes, part.nbytes)

    def check_maps(self) -> None:
        """Raise StreamError where a file was cut short while something was computed on its map."""
        for file in self._files.values():
            if file.guard is not None and file.guard.broken:
                raise StreamError(
                    f"{file.path} was cut short while the model computed on it. Fetch the model again, then load it."
                )

    def give_up(self, read: Read) -> None:
        """Read no more of an expert that nobody wants; what is being read at this moment is read to its end."""
        read.cancel()
        with self._ready:
            left = [piece for piece in self._guessed if piece[0] is read]
            if left:
                self._guessed = collections.deque(piece for piece in self._guessed if piece[0] is not read)
        for _ in left:
            read.finish_piece(StreamError("The read was given up."))

    def close(self) -> None:
        """End the threads and close the files; a thread that hangs in a read keeps its files open."""
        with self._ready:
            self._closed = True
            left = [*self._wanted, *self._guessed]
            self._wanted.clear()
            self._guessed.clear()
            self._ready.notify_all()
        for read, _ in left:
            read.finish_piece(StreamError("The model was closed while an expert was being read."))
        for thread in self._threads:
            thread.join(timeout=1)
        if any(thread.is_alive() for thread in self._threads):
            return
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files.values():
            os.close(file.buffered)
            if file.direct is not None:
                os.close(file.direct)
        self._files.clear()

    def _serve(self) -> None:
        staging: Bytes | None = None
        while True:
            with self._ready:
                while not (self._wanted or self._guessed or self._closed):
                    self._ready.wait()
                if self._closed:
                    return
                read, parts = (self._wanted or self._guessed).popleft()
            error: BaseException | None = None
            if read.cancelled:
                error = StreamError("The read was given up.")
            else:
                try:
                    if staging is None and any(file.direct is not None for file in self._files.values()):
                        # Without one reads are buffered.
                        with contextlib.suppress(OSError):
                            staging = _staging(self._largest)
                    began = time.perf_counter()
                    for part, into in parts:
                        self._read_part(part, read.expert, into, staging)
                    # Whatever changed before or meanwhile is seen here; a file that ended was seen there.
                    for file in {id(file): file for file in (self._files[part.file] for part, _ in parts)}.values():
                        file.check()
                    with self._counting:
                        self.counts.busy_s += time.perf_counter() - began
                except BaseException as caught:
                    error = caught
            read.finish_piece(error)

    def _read_part(self, part: Part, expert: int, into: Bytes, staging: Bytes | None) -> None:
        file = self._files[part.file]
        offset = part.offset + expert * part.nbytes
        direct = file.direct is not None and staging is not None
        try:
            spare = self.mode == "auto" and (self.plenty or _cached(file, offset, part.nbytes))
            if direct and not spare:
                self._read_direct(file, offset, into, staging)
            else:
                _read_buffered(file, offset, into)
        except OSError as error:
            raise StreamError(
                f"Reading expert {expert} of {part.projection} from {part.file} failed at byte {offset:,}: "
                f"{(error.strerror or str(error)).lower()}. Check the disk, then load the model again."
            ) from error
        with self._counting:
            self.counts.nbytes += part.nbytes

    def _read_direct(self, file: _File, offset: int, into: Bytes, staging: Any) -> None:
        if into.ctypes.data % DIRECT_BLOCK == offset % DIRECT_BLOCK and _read_in_place(file, offset, into, staging):
            return
        first = offset // DIRECT_BLOCK * DIRECT_BLOCK
        ahead = offset - first
        length = -(-(ahead + into.size) // DIRECT_BLOCK) * DIRECT_BLOCK
        assert file.direct is not None
        needed, done = ahead + into.size, 0
        while done < needed:
            got = os.preadv(file.direct, [memoryview(staging)[done:length]], first + done)
            if got == 0:
                raise _ended(file, first + done)
            if done + got < needed and got < DIRECT_BLOCK:
                # Less than a block: direct reads cannot go on from there.
                _read_buffered(file, first + done, staging[done:needed])
                break
            done += got
            if done < needed:
                done -= done % DIRECT_BLOCK
        np.copyto(into, staging[ahead : ahead + into.size])


def _read_in_place(file: _File, offset: int, into: Bytes, staging: Bytes) -> bool:
    """Read directly into memory that lies to a block as the file does; only the blocks at its ends pass by `staging`.

    Returns False where it did not get all, for which there is another way.
    """
    assert file.direct is not None
    ahead, end = offset % DIRECT_BLOCK, (offset + into.size) % DIRECT_BLOCK
    before = DIRECT_BLOCK - ahead if ahead else 0
    if into.size <= before + end:
        return False
    first, last = staging[:DIRECT_BLOCK], staging[DIRECT_BLOCK : 2 * DIRECT_BLOCK]
    middle = into[before : into.size - end]
    # As views: that is what the type checker knows of `preadv`.
    pieces = [*([first.data] if before else []), middle.data, *([last.data] if end else [])]
    if os.preadv(file.direct, pieces, offset - ahead) < ahead + into.size:
        return False
    if before:
        into[:before] = first[ahead:]
    if end:
        into[into.size - end :] = last[:end]
    return True


def _ended(file: _File, at: int) -> StreamError:
    return StreamError(
        f"{file.path} ended at byte {at:,} while an expert was being read; it had {file.identity.size:,} bytes when "
        f"the model was loaded. Fetch the model again."
    )


def _read_buffered(file: _File, offset: int, into: Bytes) -> None:
    view, done = memoryview(into.data), 0
    while done < len(view):
        got = os.preadv(file.buffered, [view[done:]], offset + done)
        if got == 0:
            raise _ended(file, offset + done)
        done += got


def read_buffer_bytes(largest: int) -> int:
    """Return what one thread reads through where reads are direct and no part is above `largest` bytes."""
    page = DIRECT_BLOCK if largest < _HUGE_FROM else _HUGE
    return -(-(largest + 2 * DIRECT_BLOCK) // page) * page


def _staging(largest: int) -> Bytes:
    """Return memory for direct reads of parts up to `largest` bytes, on huge pages where the system has them."""
    nbytes = read_buffer_bytes(largest)
    if nbytes % _HUGE:
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    # Private: shared memory is not put on huge pages. One page more, to begin where one does.
    memory = mmap.mmap(-1, nbytes + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    first = -whole.ctypes.data % _HUGE
    return whole[first : first + nbytes]


def _pieces(layer: LayerExperts, into: Sequence[Bytes]) -> list[tuple[tuple[Part, Bytes], ...]]:
    """Split an expert into what threads read side by side: a large part each, small ones with what is before them."""
    pieces: list[list[tuple[Part, Bytes]]] = []
    for part, target in zip(layer.parts, into, strict=True):
        if pieces and part.nbytes <= _SMALL:
            pieces[-1].append((part, target))
        else:
            pieces.append([(part, target)])
    return [tuple(piece) for piece in pieces]


def _open(path: Path, mode: str) -> _File:
    try:
        buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StreamError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if sys.platform == "darwin":
        import fcntl

        # Experts are read again from the bank, not from the page cache, which would grow at the bank's cost.
        if mode != "buffered":
            fcntl.fcntl(buffered, fcntl.F_NOCACHE, 1)
        fcntl.fcntl(buffered, fcntl.F_RDAHEAD, 0)
        return _File(path, buffered, None, _Identity.of(buffered))
    # Reading ahead fetches experts that nobody asked for.
    os.posix_fadvise(buffered, 0, 0, os.POSIX_FADV_RANDOM)
    file = _File(path, buffered, _open_direct(path) if mode != "buffered" else None, _Identity.of(buffered))
    if file.direct is not None and mode == "auto" and file.identity.size:
        file.map = mmap.mmap(buffered, 0, prot=mmap.PROT_READ)
        file.address = page_cache.address_of(file.map)
    return file


def _open_direct(path: Path) -> int | None:
    """Open a file for direct I/O; None where its file system does not offer that."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    try:
        os.preadv(descriptor, [mmap.mmap(-1, DIRECT_BLOCK)], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _cached(file: _File, offset: int, nbytes: int) -> bool:
    return file.map is not None and page_cache.holds(file.address + offset, nbytes)
