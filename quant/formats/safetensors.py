"""Reads and checks the header of a .safetensors file without touching its tensors.

Layout, after the specification of the safetensors library: u64 length of the header, the header (a JSON object of name
-> dtype, shape, data_offsets, and optionally `__metadata__` of strings), the data. The specification wants the tensors'
byte ranges to cover the data without hole or overlap. All of that is checked against the file's length, so that whoever
reads a tensor afterwards may trust its offsets.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edger1.errors import FormatError

MAX_HEADER_BYTES = 100_000_000
"""The bound that the safetensors library itself keeps."""

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor: `offset` is in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: `entries` by name, in the order of their bytes.

    `size` is the file's, `digest` the SHA-256 of the header's bytes, `modified_ns` when the file was last changed, and
    None where only the header was at hand.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int
    digest: str
    modified_ns: int | None = None


def read_header(path: Path) -> Header:
    """Read the header of a .safetensors file. Raises FormatError unless the file is whole and consistent."""
    about, raw = _read_raw(path)
    return parse_header(path, raw, about.st_size, about.st_mtime_ns)


def parse_header(path: Path, raw: bytes, size: int, modified_ns: int | None = None) -> Header:
    """Check a header that was read from a file of `size` bytes; `raw` is what follows the length.

    `path` need not exist: this is for a file that has not been fetched yet.
    """
    if len(raw) > MAX_HEADER_BYTES:
        raise FormatError(f"{path} has a header of {len(raw):,} bytes; headers may take {MAX_HEADER_BYTES:,}.")
    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateError as error:
        raise FormatError(f"{path} names {error.args[0]!r} twice in its header; the file is damaged.") from None
    except (ValueError, RecursionError):
        raise FormatError(f"{path} is no safetensors file: its header is not valid JSON. Fetch it again.") from None
    if not isinstance(parsed, dict):
        raise FormatError(f"{path} is no safetensors file: its header is not a JSON object. Fetch it again.")
    # MLX writes null where it was given none.
    metadata = parsed.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ in its header is not an object of strings; the file is damaged.")
    data_start = 8 + len(raw)
    entries = [_entry(path, name, value, data_start, size) for name, value in parsed.items()]
    entries.sort(key=lambda entry: (entry.offset, entry.nbytes))
    _check_cover(path, entries, data_start, size)
    digest = hashlib.sha256(raw).hexdigest()
    return Header(path, {entry.name: entry for entry in entries}, metadata, size, digest, modified_ns)


class _DuplicateError(Exception):
    """A name that stands twice in one JSON object."""


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise _DuplicateError(name[:80])
        found[name] = value
    return found


def _read_raw(path: Path) -> tuple[os.stat_result, bytes]:
    """Return what the file system says about the file, and the bytes of its header."""
    try:
        # Without O_NONBLOCK opening a pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise FormatError(f"{path} cannot be read: {reason}.") from error
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise FormatError(f"{path} is not a regular file; expected a safetensors file.")
        if about.st_size < 10:
            raise FormatError(f"{path} is no safetensors file: it has {about.st_size} bytes. Fetch it again.")
        length = int.from_bytes(os.pread(fd, 8, 0), "little")
        if length > MAX_HEADER_BYTES or length > about.st_size - 8:
            raise FormatError(
                f"{path} claims a header of {length:,} bytes, but has {about.st_size:,} bytes in all and headers may "
                f"take {MAX_HEADER_BYTES:,}. It is truncated, damaged or no safetensors file; fetch it again."
            )
        raw = os.pread(fd, length, 8)
        if len(raw) != length:
            raise FormatError(f"{path} became shorter while its header was being read.")
        return about, raw
    finally:
        os.close(fd)


def _entry(path: Path, name: str, value: object, data_start: int, size: int) -> Entry:
    def fail(problem: str) -> FormatError:
        return FormatError(f"{path}: tensor {name[:80]!r} {problem}. It is truncated or damaged; fetch it again.")

    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise fail("is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fail(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _are_counts(shape):
        raise fail("has a shape that is not a list of whole numbers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise fail("has data_offsets that are not two whole numbers")
    begin, end = offsets
    if not begin <= end <= size - data_start:
        raise fail(f"lies at bytes {begin:,} to {end:,}, but the file holds {size - data_start:,} bytes of data")
    bits = DTYPE_BITS[dtype]
    for length in shape:
        bits *= length
        # A product of many huge numbers would grow without bound; a zero may still follow.
        if bits > 1 << 256:
            raise fail("has a shape that is larger than any file")
    if bits % 8 or bits // 8 != end - begin:
        raise fail(f"of dtype {dtype} and shape {shape} should take {bits // 8:,} bytes but takes {end - begin:,}")
    return Entry(name, dtype, tuple(shape), data_start + begin, end - begin)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 63 for item in value
    )


def _check_cover(path: Path, entries: Iterable[Entry], data_start: int, size: int) -> None:
    at = data_start
    for entry in entries:
        if entry.offset != at:
            problem = "overlaps the one before it" if entry.offset < at else "leaves a hole before it"
            raise FormatError(f"{path}: tensor {entry.name[:80]!r} {problem}; the file is damaged. Fetch it again.")
        at += entry.nbytes
    if at != size:
        raise FormatError(
            f"{path} has {size:,} bytes, but its tensors end at {at:,}; the file is damaged. Fetch it again."
        )
