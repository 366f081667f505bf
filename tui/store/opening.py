"""Opens the database, whatever lies in its place: a newer one, a damaged one, nothing that may be written.

Nothing that is found is ever deleted or written over: a damaged file is moved aside, together with what belongs to it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from edger1.errors import StoreError
from edger1.tui.store.migrations import migrate, recorded, unknown

BUSY_S = 5.0
"""How long a write waits for another window's."""
CHECKED_BYTES = 64 << 20
"""Up to this size a file is checked for damage when it is opened; a larger one would hold up the start."""
COPIED_BYTES = 256 << 20
"""Up to this size a file that may not be written is read into memory."""

_PRIMARY = 0xFF
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_NAMES = ("", "-wal", "-shm", "-journal")


@dataclass(frozen=True)
class Lane:
    """A connection and the lock that lets one thread at a time use it."""

    connection: sqlite3.Connection
    lock: threading.RLock

    @classmethod
    def over(cls, connection: sqlite3.Connection) -> Lane:
        """Return a lane with a lock of its own."""
        return cls(connection, threading.RLock())


@dataclass(frozen=True)
class Opened:
    """Connections for writing, reading and searching, which do not hold each other up, and what there is to say."""

    writing: Lane
    reading: Lane
    searching: Lane
    notices: tuple[str, ...] = ()
    read_only: bool = False
    in_memory: bool = False


class _ForeignError(Exception):
    """The file is a database, but none of ours."""


def open_database(path: Path) -> Opened:
    """Open the database at `path`; never raises for what is found there."""
    notices: list[str] = []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _one_window_at_a_time(path):
            try:
                return _open(path)
            except (_ForeignError, sqlite3.DatabaseError) as error:
                if not _is_damage(error):
                    raise
                aside = _move_aside(path)
                found = "is not a database of EdgeR1" if isinstance(error, _ForeignError) else f"is damaged ({error})"
                notices.append(f"The file of your conversations {found}. It is kept as {aside}; a new one was begun.")
                return _open(path, tuple(notices))
    except (OSError, sqlite3.Error, _ForeignError) as error:
        return _in_memory(path, error, notices)


def connect(path: Path, mode: str = "rwc") -> sqlite3.Connection:
    """Connect to the file itself. `mode` is SQLite's: "rwc", "ro", or "ro&immutable=1" for what nobody can lock."""
    address = path.absolute().as_uri()
    connection = sqlite3.connect(
        f"{address}?mode={mode}", uri=True, timeout=BUSY_S, isolation_level=None, check_same_thread=False
    )
    # One letter that was damaged must not hide all conversations.
    connection.text_factory = lambda data: data.decode("utf-8", "replace")
    for pragma in ("synchronous = normal", "foreign_keys = on", "trusted_schema = off", "cell_size_check = on"):
        connection.execute(f"pragma {pragma}")
    return connection


def _open(path: Path, notices: tuple[str, ...] = ()) -> Opened:
    connection = connect(path)
    try:
        connection.execute("pragma journal_mode = wal").fetchone()
        names = recorded(connection)
        if names is None:
            raise _ForeignError
        if path.stat().st_size <= CHECKED_BYTES:
            (found,) = connection.execute("pragma quick_check(1)").fetchone()
            if found != "ok":
                raise _damage(found)
        if unknown(names):
            connection.close()
            return _newer(path, notices)
        # Told by trying: a file that may not be written is opened all the same.
        connection.execute("begin immediate")
        connection.execute("pragma user_version = 0")
        connection.execute("rollback")
        migrate(connection)
        return Opened(Lane.over(connection), _reader(path), _reader(path), notices)
    except BaseException:
        connection.close()
        raise


def _reader(path: Path, mode: str = "rwc") -> Lane:
    connection = connect(path, mode)
    connection.execute("pragma query_only = on")
    return Lane.over(connection)


def _newer(path: Path, notices: tuple[str, ...]) -> Opened:
    mode = "ro"
    try:
        with contextlib.closing(connect(path, mode)) as probe:
            probe.execute("select count(*) from conversations").fetchone()
    except sqlite3.OperationalError:
        mode = "ro&immutable=1"
    said = (
        "Your conversations were written by a newer EdgeR1: they can be read here, and nothing is saved. "
        "Update EdgeR1 to go on with them."
    )
    writing, reading, searching = (_reader(path, mode) for _ in range(3))
    return Opened(writing, reading, searching, (*notices, said), read_only=True)


def _in_memory(path: Path, error: Exception, notices: list[str]) -> Opened:
    lane = Lane.over(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False))
    copied = _copy(path, lane.connection)
    if not copied:
        lane.connection.close()
        lane = Lane.over(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False))
    migrate(lane.connection)
    kept = "What is there can be read; " if copied else ""
    notices.append(
        f"{path} cannot be written ({_reason(path, error)}). {kept}what you write from here on is kept in memory, "
        "until you quit. Make the file and its folder writable, or set EDGER1_HOME to a folder that is."
    )
    return Opened(lane, lane, lane, tuple(notices), in_memory=True)


def _copy(path: Path, memory: sqlite3.Connection) -> bool:
    """Read what may be read into memory; False: there is nothing of ours to read."""
    for mode in ("ro", "ro&immutable=1"):
        with contextlib.suppress(OSError, sqlite3.Error):
            if not 0 < path.stat().st_size <= COPIED_BYTES:
                return False
            with contextlib.closing(connect(path, mode)) as source:
                names = recorded(source)
                if not names or unknown(names):
                    return False
                source.backup(memory)
                return True
    return False


def _is_damage(error: Exception) -> bool:
    return isinstance(error, _ForeignError) or getattr(error, "sqlite_errorcode", 0) & _PRIMARY in _DAMAGED


def _damage(found: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(" ".join(found.split())[:100])
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _move_aside(path: Path) -> Path:
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    for again in range(1000):
        aside = path.with_name(f"{path.stem}.damaged-{stamp}{f'-{again}' if again else ''}{path.suffix}")
        if not any(os.path.lexists(f"{aside}{name}") for name in _NAMES):
            break
    for name in _NAMES:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{name}").rename(f"{aside}{name}")
    return aside


@contextmanager
def _one_window_at_a_time(path: Path) -> Iterator[None]:
    """Keep another window from moving aside what this one has just begun."""
    from filelock import FileLock, Timeout

    lock: AbstractContextManager[object] = contextlib.nullcontext()
    # Where no lock can be had, the database says itself what may be done.
    with contextlib.suppress(OSError, Timeout, NotImplementedError):
        lock = FileLock(f"{path}.lock").acquire(timeout=2 * BUSY_S)
    with lock:
        yield


def _reason(path: Path, error: Exception) -> str:
    if path.is_dir():
        return "it is a folder"
    if isinstance(error, OSError):
        return (error.strerror or str(error)).lower()
    return str(error)


def explained(error: sqlite3.Error) -> StoreError:
    """Say what a failed write or read means for the user."""
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY
    if code == sqlite3.SQLITE_FULL:
        said = "The disk is full, so the conversation could not be saved. It stays here; free some space and go on."
    elif code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        said = f"Another program has held the conversations for over {BUSY_S:.0f} s, so nothing was saved. Close it."
    elif code in _DAMAGED:
        said = (
            "The file of your conversations is damaged. Start EdgeR1 again: the file is moved aside and kept, "
            "and a new one is begun."
        )
    elif code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_IOERR):
        said = f"The conversations could not be read or written ({error}). Look at the disk and its permissions."
    else:
        said = f"The conversations could not be read or written ({error})."
    return StoreError(said)
