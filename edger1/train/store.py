"""What took long to compute, kept on disk by key: a teacher's answers, its likeliest tokens, reference probabilities.

One SQLite file. An entry outlives its process once `add` returns, so that a killed run loses only what it was
computing; several processes may add at once, and the first to give a key its value decides it for all.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from edger1.errors import EdgeR1Error, FormatError

_FORMAT = 1
_APPLICATION = 0x45523144
_WAIT_S = 120.0


class StoreError(EdgeR1Error):
    """An entry cannot be kept: no space, no permission, or another process holds the file for too long."""


def key_of(*parts: Any) -> str:
    """Return the key of plain JSON values, the same in every process: 64 hexadecimal digits."""
    written = json.dumps(parts, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()


class Store:
    """Bytes by key in a file that is made where it is missing. To be used from the thread that opened it.

    Raises FormatError for a file that is no store, StoreError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._failing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_WAIT_S, isolation_level=None)
        try:
            with self._failing():
                self._prepare()
        except BaseException:
            self._database.close()
            raise

    def _prepare(self) -> None:
        run = self._database.execute
        run("BEGIN IMMEDIATE")
        try:
            found = (run("PRAGMA application_id").fetchone()[0], run("PRAGMA user_version").fetchone()[0])
            if found != (_APPLICATION, _FORMAT):
                if found != (0, 0) or run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise FormatError(f"{self.path} is a file of something else; move it away to begin anew.")
                run("CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
                run(f"PRAGMA application_id = {_APPLICATION}")
                run(f"PRAGMA user_version = {_FORMAT}")
            run("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                run("ROLLBACK")
            raise
        # With a log of its own an entry costs no wait for the disk, and outlives a killed process all the same. Where
        # another process has the file open just now, or the file system cannot do it, the slower way stays.
        with suppress(sqlite3.OperationalError):
            run("PRAGMA journal_mode = WAL")
        run("PRAGMA synchronous = NORMAL")

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.path} cannot be opened: {(error.strerror or str(error)).lower()}.") from None
        except sqlite3.OperationalError as error:
            raise StoreError(f"{self.path} cannot be used: {error}. What was kept before is still there.") from None
        except sqlite3.DatabaseError as error:
            raise FormatError(f"{self.path} is damaged ({error}); move it away to begin anew.") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        with self._failing():
            return int(self._database.execute("SELECT count(*) FROM entries").fetchone()[0])

    def get(self, key: str) -> bytes | None:
        """Return what is kept under a key, or None."""
        with self._failing():
            row = self._database.execute("SELECT value FROM entries WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def add(self, key: str, value: bytes) -> bytes:
        """Keep a value and return what counts under the key: the value of whoever came first."""
        with self._failing():
            self._database.execute("INSERT OR IGNORE INTO entries VALUES (?, ?)", (key, value))
        kept = self.get(key)
        return value if kept is None else kept

    def close(self) -> None:
        """Close the file."""
        self._database.close()
