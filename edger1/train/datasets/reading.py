"""Files of rows: JSONL, JSON, CSV and Parquet, one file or a folder of them."""

from __future__ import annotations

from pathlib import Path

from edger1.train.datasets.rows import BadRow, Dataset, Row

__all__ = ["BadRow", "Dataset", "Row", "read"]


def read(path: str | Path, *, kind: str | None = None, skip_bad: bool = False) -> Dataset:
    """Read all rows of a file, or of a folder's files in the order of their names.

    `kind` is one of `kinds.KINDS`, None detects it. With `skip_bad`, rows that are damaged or of another kind are
    counted and left out.

    Raises UsageError for a path with nothing to read, and FormatError for a bad row: file, line or row, and why.
    """
    raise NotImplementedError
