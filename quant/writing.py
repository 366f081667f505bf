"""Writes model*.safetensors piece by piece, in any order, so that a stop at any moment loses little.

All arrays are known before the first byte: a shard is laid out with its header and each row's place, made at full
length, and written into at offsets. It bears the ending `.part` until all of it is on the disk. The container, after
the safetensors specification: u64 length of the header, the header as JSON padded with spaces to a multiple of 8, then
the arrays' bytes back to back.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from edger1.quant.formats.ggml import Array
from edger1.quant.formats.safetensors import DTYPE_BITS

SHARD_BYTES = 5 << 30
"""The size at which mlx-lm's own converter splits."""
PART = ".part"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Output:
    """An array to be written: its name, safetensors' dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8

    @property
    def row_bytes(self) -> int:
        """Bytes of one row along the first axis (of all of it where it has no axis)."""
        return self.nbytes // self.shape[0] if self.shape and self.shape[0] else self.nbytes


@dataclass(frozen=True)
class Shard:
    """One file: its name and the arrays in the order of their bytes."""

    file: str
    outputs: tuple[Output, ...]

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes, up to its data."""
        entries: dict[str, object] = {"__metadata__": {"format": "mlx"}}
        at = 0
        for output in self.outputs:
            end = at + output.nbytes
            entries[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each array begins, in bytes from the start of the file."""
        found, at = {}, len(self.header)
        for output in self.outputs:
            found[output.name] = at
            at += output.nbytes
        return found

    @cached_property
    def nbytes(self) -> int:
        """The length of the file."""
        return len(self.header) + sum(output.nbytes for output in self.outputs)


def lay_out(units: Sequence[Sequence[Output]], limit: int = SHARD_BYTES, stem: str = "model") -> tuple[Shard, ...]:
    """Deal arrays out to shards of at most `limit` bytes, in order; those of one unit stay together.

    A unit that is larger has a shard of its own. A single shard is called STEM.safetensors.
    """
    dealt: list[list[Output]] = []
    filled = 0
    for unit in units:
        size = sum(output.nbytes for output in unit)
        if not dealt or (dealt[-1] and filled + size > limit):
            dealt.append([])
            filled = 0
        dealt[-1].extend(unit)
        filled += size
    count = len(dealt)
    names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    if count == 1:
        names = [f"{stem}.safetensors"]
    return tuple(Shard(name, tuple(outputs)) for name, outputs in zip(names, dealt, strict=True))


def index(shards: Sequence[Shard], parameters: int) -> str:
    """Return the text of the index over `shards`, as mlx-lm writes it."""
    weight_map = {output.name: shard.file for shard in shards for output in shard.outputs}
    total = sum(output.nbytes for shard in shards for output in shard.outputs)
    content = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(content, indent=4)


class Writer:
    """The shards of one folder, open for writing rows in any order and from any thread.

    Raises OSError where the disk is full or refuses.
    """

    def __init__(self, folder: Path, shards: Iterable[Shard]) -> None:
        self.folder = folder
        self._place = {output.name: (shard, output) for shard in shards for output in shard.outputs}
        self._open: dict[str, int] = {}
        self._dirty: set[str] = set()
        self._lock = threading.Lock()
        self._failure: OSError | None = None

    def write(self, name: str, start: int, array: Array) -> int:
        """Write rows of the array `name` from row `start` on; returns the bytes written."""
        shard, output = self._place[name]
        data = np.ascontiguousarray(array.data)
        if array.dtype != output.dtype or data.shape[1:] != output.shape[1:]:
            raise AssertionError(f"{name}: planned {output}, got {array.dtype} {data.shape}")
        fd = self._descriptor(shard)
        at = shard.offsets[name] + start * output.row_bytes
        view = data.reshape(-1).data.cast("B") if data.size else memoryview(b"")
        while view:
            written = os.pwrite(fd, view, at)
            view, at = view[written:], at + written
        # After the bytes, so that a sync which began before them leaves the mark for the next.
        with self._lock:
            self._dirty.add(shard.file)
        return data.nbytes

    def sync(self) -> None:
        """See onto the disk what was written before the call; once that has failed, it fails for good.

        A system that could not write a page may take it for clean afterwards, and a second fsync then succeeds.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            waiting = {name: os.dup(self._open[name]) for name in self._dirty}
            self._dirty.clear()
        for fd in waiting.values():
            try:
                os.fsync(fd)
            except OSError as error:
                self._failure = self._failure or error
            finally:
                os.close(fd)
        if self._failure is not None:
            raise self._failure

    def finish(self, shard: Shard) -> None:
        """Give a shard that is whole and on the disk its name, where it has not got it yet."""
        if not (self.folder / shard.file).exists():
            # A shard of arrays without rows has not been written to.
            self._descriptor(shard)
        with self._lock:
            if (fd := self._open.pop(shard.file, None)) is not None:
                os.close(fd)
        part = self.folder / (shard.file + PART)
        if part.exists():
            part.rename(self.folder / shard.file)
            sync_path(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; nothing is renamed."""
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()

    def _descriptor(self, shard: Shard) -> int:
        with self._lock:
            if shard.file not in self._open:
                self._open[shard.file] = _create(self.folder / (shard.file + PART), shard)
            return self._open[shard.file]


def _create(path: Path, shard: Shard) -> int:
    """Open a shard for writing, at its full length and with its header; what it holds of rows already stays."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(fd).st_size != shard.nbytes:
            os.ftruncate(fd, 0)
            reserve(fd, shard.nbytes)
        os.pwrite(fd, shard.header, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def reserve(fd: int, nbytes: int) -> None:
    """Give an empty file its length, with the room on the disk where the file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
        else:
            return
    os.ftruncate(fd, nbytes)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, and see it onto the disk."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """See a file or the entries of a folder onto the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
