"""Reads GGUF files (versions 2 and 3, little endian) by byte ranges: the header once, then one tensor at a time.

Layout, after the specification in ggml's docs/gguf.md: magic "GGUF", u32 version, u64 tensor count, u64 metadata count,
the metadata (string key, u32 type, value), the tensor infos (string name, u32 dimensions, u64 each dimension with the
fastest first, u32 type, u64 offset), padding to `general.alignment`, the tensor data.

A file is not believed. Each count, length, offset and size is held against the bytes that the file has before anything
is allocated or read, so that a damaged or hostile file costs one `FormatError` and no more memory than a small multiple
of its own header.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.ggml import TYPES, GGMLType

Value: TypeAlias = "int | float | bool | str | np.ndarray | list[str] | list[Value]"
"""Arrays of numbers come as NumPy arrays, arrays of strings as lists, arrays of arrays as lists of arrays."""

MAGIC = b"GGUF"
MAX_HEADER_BYTES = 1 << 27
"""Far above any real header (a vocabulary of 256,000 tokens with its merges takes 12 MB)."""
MAX_STRING_BYTES = 1 << 24
MAX_NAME_BYTES = 256
"""For metadata keys and tensor names; ggml itself stops at 64 bytes for the latter."""
MAX_ENTRIES = 1 << 17
"""Of metadata, and of tensors; a DeepSeek-R1 file has 1,147 tensors."""
MAX_NESTING = 4
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

_WINDOW_BYTES = 1 << 20
_MIN_STRING_BYTES = 8
_MIN_ARRAY_BYTES = 12
_MIN_METADATA_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_INFO_BYTES = 8 + 1 + 4 + 8 + 4 + 8

_SCALARS: dict[int, str] = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: shape in row-major order (rows first), `offset` in bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself, checked. The getters raise FormatError where a value has another type."""

    name: str
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    alignment: int

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a whole number; without a default a missing key is an error."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "a whole number", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number as float; without a default a missing key is an error."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, "a number", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; without a default a missing key is an error."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Return a boolean."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false", value)
        return value

    def strings(self, key: str) -> list[str]:
        """Return a list of strings; a missing key is an error."""
        value = self._get(key, None)
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return [str(item) for item in value]
        raise self._wrong(key, "a list of strings", value)

    def numbers(self, key: str) -> np.ndarray:
        """Return a list of numbers as a one-dimensional array; a missing key is an error."""
        value = self._get(key, None)
        if not isinstance(value, np.ndarray):
            raise self._wrong(key, "a list of numbers", value)
        return value

    def _get(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(f"{self.name} has no metadata {key!r}, which a model needs; the file may be incomplete.")
        return value

    def _wrong(self, key: str, expected: str, value: Value) -> FormatError:
        return FormatError(f"{self.name}: metadata {key!r} should be {expected} but is of type {type(value).__name__}.")


class GGUFFile:
    """An open GGUF file: `header` is read and checked at once, tensor bytes by `read`. A context manager.

    Raises FormatError for anything that is not a whole, consistent GGUF file.
    """

    def __init__(self, path: Path):
        self.path = path
        self._fd = _open(path)
        try:
            self.header = _read_header(path.name, self._fd, os.fstat(self._fd).st_size)
        except BaseException:
            self.close()
            raise

    def read(self, tensor: TensorInfo, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the raw bytes of rows [start, stop) of a tensor, by default of all, as a fresh uint8 array.

        Rows count along the first axis; those of a quantized tensor of one dimension cannot be had apart.
        """
        row_bytes = tensor.nbytes // tensor.shape[0]
        data = np.empty(((tensor.shape[0] if stop is None else stop) - start) * row_bytes, np.uint8)
        view = memoryview(data.data)
        done = 0
        while done < len(data):
            # Several threads may read at once, so the file has no position. Some systems refuse more than 2 GiB a call.
            wanted = view[done : done + (1 << 30)]
            try:
                got = os.preadv(self._fd, [wanted], tensor.offset + start * row_bytes + done)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise FormatError(f"{self.path.name}: tensor {tensor.name!r} cannot be read: {reason}.") from error
            if not got:
                raise FormatError(f"{self.path.name} became shorter while tensor {tensor.name!r} was being read.")
            done += got
        return data

    def stamp(self) -> str:
        """Return what changes with the file: its name, size and time of last change."""
        about = os.fstat(self._fd)
        return f"{self.path.name} {about.st_size} {about.st_mtime_ns}"

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file. Raises FormatError."""
    with GGUFFile(path) as file:
        return file.header


def _open(path: Path) -> int:
    try:
        # Without O_NONBLOCK opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise FormatError(f"{path} cannot be read: {reason}.") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{path} is not a regular file; expected a GGUF file.")
    return fd


class _Cursor:
    """Walks over the header of a file of `size` bytes; nothing beyond the end is ever asked for."""

    def __init__(self, name: str, fd: int, size: int):
        self.name = name
        self.size = size
        self._fd = fd
        self._limit = min(size, MAX_HEADER_BYTES)
        self._window = b""
        self._start = 0
        self._at = 0

    @property
    def position(self) -> int:
        return self._start + self._at

    @property
    def left(self) -> int:
        return self._limit - self.position

    def fail(self, problem: str) -> FormatError:
        return FormatError(f"{self.name}: {problem}")

    def take(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > len(self._window):
            if count > self.left:
                if self._limit < self.size:
                    raise self.fail(f"the header runs past {MAX_HEADER_BYTES:,} bytes at {what}; the file is damaged.")
                raise self.fail(
                    f"the file ends inside {what}: {count:,} bytes are needed at offset {self.position:,}, but it has "
                    f"{self.size:,} bytes in all. It is truncated or damaged; fetch it again."
                )
            self._start = self.position
            wanted = min(max(count, _WINDOW_BYTES), self._limit - self._start)
            self._window = os.pread(self._fd, wanted, self._start)
            self._at = 0
            end = count
            if end > len(self._window):
                raise self.fail(f"the file became shorter while {what} was being read.")
        data = self._window[self._at : end]
        self._at = end
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, item_bytes: int, limit: int = MAX_HEADER_BYTES) -> int:
        """Read a count of items that take `item_bytes` each at least, so many as can lie in what is left."""
        count = self.u64(f"the number of {what}")
        if count > limit or count * item_bytes > self.left:
            raise self.fail(
                f"claims {count:,} {what}, which cannot fit in the {self.left:,} bytes left for its header. "
                "The file is truncated or damaged; fetch it again."
            )
        return count

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        length = self.u64(f"the length of {what}")
        if length > limit:
            raise self.fail(f"{what} claims a length of {length:,} bytes; at most {limit:,} are allowed.")
        data = self.take(length, what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not valid UTF-8 (byte {error.start}); the file is damaged.") from None


def _read_header(name: str, fd: int, size: int) -> Header:
    cursor = _Cursor(name, fd, size)
    version = _check_preamble(cursor)
    tensor_count = cursor.count("tensors", _MIN_TENSOR_INFO_BYTES, MAX_ENTRIES)
    metadata_count = cursor.count("metadata entries", _MIN_METADATA_BYTES, MAX_ENTRIES)
    metadata: dict[str, Value] = {}
    for index in range(metadata_count):
        key = cursor.string(f"the key of metadata entry {index}", MAX_NAME_BYTES)
        if not key or key in metadata:
            raise cursor.fail(f"metadata key {key!r} is {'given twice' if key else 'empty'}; the file is damaged.")
        metadata[key] = _read_value(cursor, key, cursor.u32(f"the type of {key!r}"), 0)
    alignment = _alignment(cursor, metadata)
    infos = [_read_tensor_info(cursor, index) for index in range(tensor_count)]
    data_start = -(-cursor.position // alignment) * alignment
    tensors = _place_tensors(cursor, infos, data_start, alignment)
    return Header(name, version, metadata, tensors, alignment)


def _check_preamble(cursor: _Cursor) -> int:
    if cursor.size < 24:
        raise cursor.fail(f"is no GGUF file: it has {cursor.size} bytes, and the smallest header takes 24.")
    magic = cursor.take(4, "the magic number")
    if magic != MAGIC:
        raise cursor.fail(f"is no GGUF file: it begins with {magic!r} instead of {MAGIC!r}.")
    version = cursor.u32("the version")
    if version & 0xFFFF == 0:
        raise cursor.fail("is a big-endian GGUF file; only little-endian ones are supported. Get the usual variant.")
    if version not in (2, 3):
        raise cursor.fail(f"has GGUF version {version}; versions 2 and 3 are supported.")
    return version


def _read_value(cursor: _Cursor, key: str, kind: int, depth: int) -> Value:
    if kind in _SCALARS:
        dtype = np.dtype(_SCALARS[kind])
        data = cursor.take(dtype.itemsize, f"the value of {key!r}")
        if kind == 7 and data[0] > 1:
            raise cursor.fail(f"metadata {key!r} is a boolean with the value {data[0]}; the file is damaged.")
        value: Value = np.frombuffer(data, dtype)[0].item()
        return value
    if kind == _STRING:
        return cursor.string(f"the value of {key!r}")
    if kind == _ARRAY:
        return _read_array(cursor, key, depth + 1)
    raise cursor.fail(f"metadata {key!r} has the unknown type {kind}; the file is damaged or newer than this program.")


def _read_array(cursor: _Cursor, key: str, depth: int) -> Value:
    if depth > MAX_NESTING:
        raise cursor.fail(f"metadata {key!r} nests arrays more than {MAX_NESTING} deep; the file is damaged.")
    kind = cursor.u32(f"the item type of {key!r}")
    items = f"items of {key!r}"
    if kind in _SCALARS:
        dtype = np.dtype(_SCALARS[kind])
        count = cursor.count(items, dtype.itemsize)
        data = cursor.take(count * dtype.itemsize, f"the {items}")
        if kind == 7 and data.strip(b"\x00\x01"):
            raise cursor.fail(f"metadata {key!r} holds booleans other than 0 and 1; the file is damaged.")
        return np.frombuffer(data, dtype)
    if kind == _STRING:
        what = f"an item of {key!r}"
        return [cursor.string(what) for _ in range(cursor.count(items, _MIN_STRING_BYTES))]
    if kind == _ARRAY:
        return [_read_array(cursor, key, depth + 1) for _ in range(cursor.count(items, _MIN_ARRAY_BYTES))]
    raise cursor.fail(f"metadata {key!r} has items of the unknown type {kind}; the file is damaged.")


def _alignment(cursor: _Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    usable = isinstance(alignment, int) and not isinstance(alignment, bool) and 0 < alignment <= 1 << 20
    if not usable or not isinstance(alignment, int) or alignment & (alignment - 1):
        shown = alignment if isinstance(alignment, int | float | str) else type(alignment).__name__
        raise cursor.fail(f"general.alignment is {str(shown)[:40]!r}; expected a power of two up to 1,048,576.")
    return alignment


def _read_tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.string(f"the name of tensor {index}", MAX_NAME_BYTES)
    what = f"the description of tensor {name!r}"
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name!r} claims {dimensions:,} dimensions; 1 to {MAX_DIMENSIONS} are possible.")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, what))
    type_id = cursor.u32(what)
    offset = cursor.u64(what)
    kind = TYPES.get(type_id)
    if kind is None:
        raise cursor.fail(f"tensor {name!r} has the unknown type {type_id}; the file is damaged or newer than this.")
    elements = 1
    for size in sizes:
        elements *= size
    if elements == 0:
        raise cursor.fail(f"tensor {name!r} has a dimension of zero in {list(sizes)}; the file is damaged.")
    if sizes[0] % kind.block_elements:
        raise cursor.fail(
            f"tensor {name!r} has rows of {sizes[0]:,} elements, which {kind.name} cannot split into blocks of "
            f"{kind.block_elements}; the file is damaged."
        )
    nbytes = elements // kind.block_elements * kind.block_bytes
    if nbytes > cursor.size:
        raise cursor.fail(
            f"tensor {name!r} of shape {list(reversed(sizes))} would take {nbytes:,} bytes, more than the whole file "
            f"({cursor.size:,}). It is truncated or damaged; fetch it again."
        )
    return TensorInfo(name, tuple(reversed(sizes)), kind, offset, nbytes)


def _place_tensors(
    cursor: _Cursor, infos: Sequence[TensorInfo], data_start: int, alignment: int
) -> dict[str, TensorInfo]:
    """Turn offsets into absolute ones and see that each tensor lies whole in the file and shares no byte."""
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if not info.name or info.name in tensors:
            raise cursor.fail(f"tensor name {info.name!r} is {'given twice' if info.name else 'empty'}.")
        if info.offset % alignment:
            raise cursor.fail(f"tensor {info.name!r} begins at {info.offset:,}, which is no multiple of {alignment}.")
        start = data_start + info.offset
        if start + info.nbytes > cursor.size:
            raise cursor.fail(
                f"tensor {info.name!r} should end at byte {start + info.nbytes:,}, but the file has {cursor.size:,}. "
                "It is truncated or damaged; fetch it again."
            )
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.nbytes)
    before: TensorInfo | None = None
    for info in sorted(tensors.values(), key=lambda info: info.offset):
        if before is not None and info.offset < before.offset + before.nbytes:
            raise cursor.fail(f"tensors {before.name!r} and {info.name!r} overlap; the file is damaged.")
        before = info
    return tensors
