"""The weight files of a folder as raw tensors, of which any rows or columns are read by themselves.

A file is opened when the first of its bytes is wanted, so that it need not be there before, and is held against what
its header said each time it is read. Nothing is mapped, so that no memory is used but what the caller gets.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats import safetensors
from edger1.quant.formats.safetensors import DTYPE_BITS, Entry, Header

_CONTAINERS = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1",
    "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4",
    "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_MOST_BYTES = 1 << 30


class WeightFiles:
    """The open files of a source. Reading is safe from several threads at once.

    `fingerprint` changes with any name, size, time of change or header. Close it, or use it in a `with`.
    """

    def __init__(self, headers: Iterable[Header]):
        self._headers = {header.path: header for header in headers}
        self._coming = {path for path, header in self._headers.items() if header.modified_ns is None}
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()
        digest = hashlib.sha256()
        for path, header in sorted(self._headers.items()):
            digest.update(f"{path.name}\0{header.size}\0{header.modified_ns}\0{header.digest}\n".encode())
        self.fingerprint = digest.hexdigest()

    def tensors(self) -> dict[str, RawTensor]:
        """Return every tensor by name. Raises FormatError where two files hold one of the same name."""
        found: dict[str, RawTensor] = {}
        for path, header in self._headers.items():
            for name, entry in header.entries.items():
                if name in found:
                    raise FormatError(
                        f"Tensor {name[:80]!r} is in both {found[name].path.name} and {path.name} of {path.parent}; "
                        "only one of them can be meant. Fetch the model again."
                    )
                found[name] = RawTensor(self, path, entry)
        return found

    def was_present(self, path: Path) -> bool:
        """Whether the file was there when this was made, rather than its header alone."""
        return path not in self._coming

    def read_into(self, path: Path, offset: int, out: np.ndarray, stride: int = 0) -> None:
        """Fill `out` (contiguous) with the bytes of the file from `offset` on.

        With a `stride` each row of `out` begins that many bytes after the one before it, and what lies between is not
        read.
        """
        pieces = [row.view(np.uint8).data for row in out] if stride else [out.reshape(-1).view(np.uint8).data]
        fd = self._open(path)
        try:
            for index, piece in enumerate(pieces):
                _fill(fd, piece, offset + index * stride, path)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
        self._check_unchanged(path, fd)

    def release(self, path: Path) -> None:
        """Close one file, which frees its space where it has been removed; reading it again opens it again."""
        with self._lock:
            fd = self._fds.pop(path, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close all files."""
        for path in list(self._fds):
            self.release(path)

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._fds:
                expected = self._headers[path]
                # A file may come after its header did: then it is held against that header once, here.
                if expected.modified_ns is None:
                    arrived = safetensors.read_header(path)
                    if (arrived.size, arrived.digest) != (expected.size, expected.digest):
                        raise FormatError(f"{path} is not the file that its header announced; fetch it again.")
                    self._headers[path] = arrived
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
                except OSError as error:
                    reason = (error.strerror or str(error)).lower()
                    raise FormatError(f"{path} cannot be read: {reason}.") from error
                self._fds[path] = fd
            return self._fds[path]

    def _check_unchanged(self, path: Path, fd: int) -> None:
        about, expected = os.fstat(fd), self._headers[path]
        if (about.st_size, about.st_mtime_ns) != (expected.size, expected.modified_ns):
            raise FormatError(f"{path} was changed while it was being read; start again when it is complete.")


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it lies in its file: rows are counted along the first axis, numbers come in their container.

    bfloat16 comes as uint16, and 8-bit floats as uint8.
    """

    files: WeightFiles
    path: Path
    entry: Entry

    @property
    def name(self) -> str:
        """The name in the file."""
        return self.entry.name

    @property
    def dtype(self) -> str:
        """The dtype as safetensors names it."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        """The bytes in the file."""
        return self.entry.nbytes

    @property
    def present(self) -> bool:
        """Whether the file was there when the source was opened."""
        return self.files.was_present(self.path)

    def all(self) -> np.ndarray:
        """Return the whole tensor."""
        out = np.empty(self.shape, self._container())
        self.files.read_into(self.path, self.entry.offset, out)
        return out

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a tensor with one axis at least."""
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {self.name!r}, which has {self.shape[0]}")
        out = np.empty((stop - start, *self.shape[1:]), self._container())
        if out.size:
            row_bytes = self.entry.nbytes // self.shape[0]
            self.files.read_into(self.path, self.entry.offset + start * row_bytes, out)
        return out

    def columns(self, start: int, stop: int) -> np.ndarray:
        """Return columns [start, stop) of a matrix, contiguous; nothing else is read."""
        height, width = self.shape
        if not 0 <= start <= stop <= width:
            raise IndexError(f"columns {start} to {stop} of {self.name!r}, which has {width}")
        if (start, stop) == (0, width):
            return self.all()
        out = np.empty((height, stop - start), self._container())
        if out.size:
            offset = self.entry.offset + start * out.itemsize
            self.files.read_into(self.path, offset, out, stride=width * out.itemsize)
        return out

    def _container(self) -> np.dtype[np.generic]:
        return np.dtype(_CONTAINERS[self.dtype])


def _fill(fd: int, view: memoryview, offset: int, path: Path) -> None:
    at = 0
    while at < len(view):
        count = os.preadv(fd, [view[at : at + _MOST_BYTES]], offset + at)
        if count == 0:
            raise FormatError(f"{path} became shorter while it was being read; fetch it again.")
        at += count


def check_readable(tensor: RawTensor) -> None:
    """Raise FormatError where the dtype is one that safetensors knows but nothing here can read."""
    if tensor.dtype not in _CONTAINERS:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name[:80]!r} has the dtype {tensor.dtype}, which cannot be converted; "
            f"{', '.join(sorted(_CONTAINERS))} can. Get the model in one of those."
        )


assert _CONTAINERS.keys() <= DTYPE_BITS.keys()
