"""A file or folder of files as rows of one kind.

The kind is found on the first thousand rows, and every row is then read as that kind: a row that is of another one, or
none, is an error with its place and the reason, or with `skip_bad` left out and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from edger1.errors import FormatError, UsageError
from edger1.train.datasets.files import data_files, records
from edger1.train.datasets.kinds import CHATS, KINDS, convert, fields_of, kind_of
from edger1.train.datasets.rows import BadRow, Dataset, Row

__all__ = ["BadRow", "Dataset", "Row", "read"]

_LOOKED_AT = 1000
_KEPT_REASONS = 20

Found = tuple[str, dict[str, Any] | str]


def read(path: str | Path, *, kind: str | None = None, skip_bad: bool = False) -> Dataset:
    """Read all rows of a file, or of a folder's files in the order of their names.

    `kind` is one of `kinds.KINDS`, None detects it. With `skip_bad`, rows that are damaged or of another kind are
    counted and left out.

    Raises UsageError for a path with nothing to read, and FormatError for a bad row: file, line or row, and why.
    """
    path = Path(path).expanduser()
    if kind is not None and kind not in KINDS:
        raise UsageError(f'"{kind}" is no kind of rows; expected one of {", ".join(KINDS)}.')
    files = data_files(path)
    found = _all(files)
    first = list(islice(found, _LOOKED_AT))
    chosen = kind or _detect(first, path, skip_bad)
    rows: list[Row] = []
    bad: list[BadRow] = []
    bad_count = 0
    fields: tuple[str, ...] = ()
    markers: Counter[str] = Counter()
    for where, record in chain(first, found):
        try:
            if isinstance(record, str):
                raise ValueError(record)
            row, used, had = convert(record, chosen, where)
        except ValueError as error:
            if not skip_bad:
                raise FormatError(f"{where}: {error}. To leave such rows out: --skip-bad") from None
            bad_count += 1
            if len(bad) < _KEPT_REASONS:
                bad.append(BadRow(where, str(error)))
            continue
        rows.append(row)
        fields = fields or used
        if had is not None:
            markers[had] += 1
    if not rows:
        reason = f" All {bad_count:,} are bad; the first: {bad[0].where}: {bad[0].reason}." if bad else ""
        raise FormatError(f"{path} holds no rows.{reason}")
    names = tuple(str(file.relative_to(path)) if path.is_dir() else file.name for file in files)
    return Dataset(rows, chosen, bad, bad_count, fields, dict(markers), names)


def _all(files: list[Path]) -> Iterator[Found]:
    for file in files:
        for where, record in records(file):
            yield f"{file.name}, {where}", record


def _detect(first: list[Found], path: Path, skip_bad: bool) -> str:
    """Return the kind of the first rows; where they are mixed, one that reads them all.

    Raises FormatError where there is none; with `skip_bad` the most frequent one is taken.
    """
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for where, record in first:
        own = None if isinstance(record, str) else kind_of(record)
        if own is not None:
            kinds[own] += 1
            examples.setdefault(own, where)
        elif not skip_bad:
            raise FormatError(f"{where}: {_why_none(record)}. To leave such rows out: --skip-bad")
    chats = [kind for kind in ("messages", "conversations") if kinds[kind]]
    if chats:
        # Among conversations with answers, one without is no prompt but a bad row.
        unanswered = sum(isinstance(r, dict) and kind_of(r) == "prompt" and not _asks(r) for _, r in first)
        kinds[chats[0]] += unanswered
        kinds["prompt"] -= unanswered
        kinds = +kinds
    if not kinds:
        where, record = first[0] if first else (str(path), "the file is empty")
        raise FormatError(f"{path} holds no rows that can be learned from; {where}: {_why_none(record)}.")
    # Any chat can be read as a prompt and any row with a text as one, by leaving out the rest: never unasked.
    ordered = [kind for kind, _ in kinds.most_common()]
    for kind in ordered:
        if len(ordered) == 1 or (kind not in ("prompt", "text") and _reads_all(first, kind)):
            return kind
    if skip_bad:
        return ordered[0]
    a, b = ordered[:2]
    raise FormatError(
        f'{path} mixes kinds of rows: {examples[a]} is "{a}" and {examples[b]} is "{b}" (of the first {len(first):,}: '
        f"{', '.join(f'{count:,} {kind}' for kind, count in kinds.most_common())}). Give one kind a file, read all "
        f"as one with --format {a}, or leave the others out with --skip-bad."
    )


def _asks(record: dict[str, Any]) -> bool:
    return fields_of(record)["prompt"][0] not in CHATS


def _reads_all(first: list[Found], kind: str) -> bool:
    try:
        for where, record in first:
            if not isinstance(record, str):
                convert(record, kind, where)
    except ValueError:
        return False
    return True


def _why_none(record: dict[str, Any] | str) -> str:
    if isinstance(record, str):
        return record
    if fields_of(record):
        return "it is empty"
    return (
        f"its columns ({', '.join(list(record)[:8])}) are those of no known kind; expected, for instance, messages, "
        "prompt and completion, or text"
    )
