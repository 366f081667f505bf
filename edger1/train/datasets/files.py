"""Files of records: JSONL, JSON, CSV and Parquet.

Records are yielded with the number of their line or row. What is damaged is yielded too, as a reason instead of a
record, and reading goes on behind it where the format allows.
"""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edger1.errors import FormatError, UsageError

_BOM = b"\xef\xbb\xbf"

Found = tuple[str, dict[str, Any] | str]
"""Where ("line 3", "row 7"), and a record, or the reason why there is none."""


def data_files(path: Path) -> list[Path]:
    """Return the files to read for a path: itself, or a folder's files in the order of their names.

    JSON files of a folder count only where it has no others: beside data they usually describe it. Raises UsageError
    where there is nothing to read.
    """
    if path.is_file():
        if _suffix(path) not in _READERS:
            raise UsageError(f"{path} is no file of rows; expected one of {_KNOWN}.")
        return [path]
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; expected a file of rows ({_KNOWN}), or a folder of such files.")
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and _suffix(file) in _READERS
        and not any(p.startswith(".") for p in file.relative_to(path).parts)
    )
    rows = [file for file in files if _suffix(file) != ".json"] or files
    if not rows:
        raise UsageError(f"{path} holds no file of rows; expected {_KNOWN}.")
    return rows


def records(path: Path) -> Iterator[Found]:
    """Yield the records of a file. Raises FormatError where the file as a whole cannot be read."""
    try:
        yield from _READERS[_suffix(path)](path)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error}.") from None


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return "".join(suffixes) if suffixes[-1:] == [".gz"] else "".join(suffixes[-1:])


def _jsonl(path: Path) -> Iterator[Found]:
    with path.open("rb") as stream:
        yield from _json_lines(stream, path)


def _jsonl_gz(path: Path) -> Iterator[Found]:
    with gzip.open(path, "rb") as stream:
        yield from _json_lines(stream, path)


def _json_lines(stream: Iterable[bytes], path: Path) -> Iterator[Found]:
    blank: list[int] = []
    try:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                # Lines at the end may be empty.
                blank.append(number)
                continue
            for empty in blank:
                yield f"line {empty}", "the line is empty"
            blank.clear()
            yield f"line {number}", _parsed(line[3:] if number == 1 and line.startswith(_BOM) else line)
    except (EOFError, OSError, zlib.error) as error:
        raise FormatError(f"{path} is damaged: {error}.") from None


def _parsed(line: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 (byte {error.start + 1})"
    except json.JSONDecodeError as error:
        return f"it is not JSON ({error.msg}, column {error.colno})"
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return f"it is not JSON ({error})"
    return _object(record)


def _object(record: Any) -> dict[str, Any] | str:
    if not isinstance(record, dict):
        return f"it is {type(record).__name__} and not an object with columns"
    return record or "it is empty"


def _json(path: Path) -> Iterator[Found]:
    try:
        whole = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 (byte {error.start + 1}).") from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            # Many files called .json have one object a line.
            yield from _jsonl(path)
            return
        raise FormatError(f"{path} is not JSON: {error.msg}, line {error.lineno}, column {error.colno}.") from None
    except RecursionError:
        raise FormatError(f"{path} is nested too deeply.") from None
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}.") from None
    rows = whole
    if isinstance(whole, dict):
        lists = [
            name for name, value in whole.items() if isinstance(value, list) and isinstance((value or [0])[0], dict)
        ]
        rows = whole[lists[0]] if len(lists) == 1 else None
        if "messages" in whole or "conversations" in whole:
            # The file is one conversation.
            rows = [whole]
    if not isinstance(rows, list):
        raise FormatError(f"{path} holds neither a list of rows nor an object with one such list.")
    for number, record in enumerate(rows, 1):
        yield f"row {number}", _object(record)


def _csv(path: Path) -> Iterator[Found]:
    yield from _table(path, ",")


def _tsv(path: Path) -> Iterator[Found]:
    yield from _table(path, "\t")


@contextmanager
def _long_cells() -> Iterator[None]:
    """Traces are longer than the 131,072 characters that the csv module allows a cell."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _table(path: Path, delimiter: str) -> Iterator[Found]:
    with path.open("rb") as stream:
        lines = _Lines(stream, path)
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        names = _next(reader, path)
        if isinstance(names, str) or not names:
            raise FormatError(f"{path} has no first line with the names of its columns{f': {names}' if names else ''}.")
        if len(set(names)) != len(names):
            raise FormatError(f"{path} names a column twice in its first line: {', '.join(names)}.")
        while True:
            begin = lines.number + 1
            cells = _next(reader, path)
            if cells is None:
                return
            where = f"line {begin}"
            if isinstance(cells, str):
                yield where, cells
            elif not cells:
                yield where, "the line is empty"
            elif len(cells) != len(names):
                yield where, f"it has {len(cells)} cells; the first line names {len(names)} columns"
            else:
                yield where, dict(zip(names, cells, strict=True))


class _Lines:
    """Decoded lines, and the number of the last one."""

    def __init__(self, stream: Any, path: Path) -> None:
        self._stream, self._path, self.number = stream, path, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self._stream)
        self.number += 1
        if self.number == 1 and line.startswith(_BOM):
            line = line[3:]
        try:
            return str(line.decode())
        except UnicodeDecodeError as error:
            raise FormatError(f"{self._path}, line {self.number} is not UTF-8 (byte {error.start + 1}).") from None


def _next(reader: Any, path: Path) -> list[str] | str | None:
    try:
        with _long_cells():
            return list(next(reader))
    except StopIteration:
        return None
    except csv.Error as error:
        return f"it is not CSV ({error})"


def _parquet(path: Path) -> Iterator[Found]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(f"{path} is Parquet, which needs pyarrow: pip install 'edger1[train]'") from None
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", {k: v for k, v in record.items() if v is not None} or "it is empty"
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{path} is damaged behind row {number}, or no Parquet file: {error}.") from None


_READERS: dict[str, Callable[[Path], Iterator[Found]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
_KNOWN = ", ".join(_READERS)
