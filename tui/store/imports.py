"""Brings conversations in from files: ChatGPT's export, the logs of `llm`, our own JSON.

A file is read twice: once whole, so that one that is broken at its end changes nothing, then again to save it, a
conversation at a time and each in a short transaction, so that other windows are not held up. Ids are made of those in
the file: what was brought in before is not brought in twice, and a later export adds what has been said since.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from edger1.errors import EdgeR1Error, FormatError
from edger1.tui.store import chatgpt, llm_logs, own_json
from edger1.tui.store.json_stream import values
from edger1.tui.store.records import Stored
from edger1.tui.store.store import Store

_SQLITE = b"SQLite format 3\x00"
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_CONVERSATIONS = re.compile(r"(?:.*/)?conversations(?:-\d+)?\.json")
EXPECTED = "a ChatGPT export (the zip or its conversations.json), the logs.db of llm, or JSON that EdgeR1 wrote"


@dataclass(frozen=True)
class Imported:
    """How many conversations a file had: new ones, ones that got more messages, ones that were here already."""

    new: int = 0
    updated: int = 0
    unchanged: int = 0

    def __str__(self) -> str:
        total = self.new + self.updated + self.unchanged
        parts = [(self.new, "new"), (self.updated, "with more messages"), (self.unchanged, "here already")]
        said = ", ".join(f"{count} {what}" for count, what in parts if count)
        return f"{total} conversation{'' if total == 1 else 's'}" + (f": {said}" if said else "")


def bring_in(store: Store, path: Path) -> Imported:
    """Bring the conversations of a file in. Raises an EdgeR1Error, having changed nothing, where it cannot be read."""
    found = sum(1 for _ in read(path))
    if not found:
        raise FormatError(f"{path} has no conversations.")
    counts = Counter(store.insert(stored) for stored in read(path))
    return Imported(counts["new"], counts["updated"], counts["unchanged"])


def read(path: Path) -> Iterator[Stored]:
    """Return the conversations of a file one by one, whatever of `EXPECTED` it is. Raises FormatError."""
    try:
        with path.open("rb") as file:
            begin = file.read(16)
        if begin == _SQLITE:
            yield from llm_logs.read(path)
        elif begin.startswith(_ZIP):
            yield from _zipped(path)
        else:
            with path.open("rb") as file:
                yield from _from_json(file, path.name)
    except EdgeR1Error:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise FormatError(f"{path} is a damaged or locked archive ({error}); nothing was brought in.") from error


def _zipped(path: Path) -> Iterator[Stored]:
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if _CONVERSATIONS.fullmatch(name))
        if not names:
            raise FormatError(f"{path} is an archive without conversations.json; expected {EXPECTED}.")
        for name in names:
            with archive.open(name) as file:
                yield from _from_json(file, f"{path.name}/{name}")


def _from_json(file: IO[bytes], where: str) -> Iterator[Stored]:
    with io.TextIOWrapper(file, encoding="utf-8") as text:
        try:
            for value in values(text, where):
                yield _conversation(value, where)
        except UnicodeDecodeError as error:
            raise FormatError(f"{where} is no text; expected {EXPECTED}.") from error


def _conversation(value: Any, where: str) -> Stored:
    if isinstance(value, dict):
        if own_json.is_ours(value):
            return own_json.conversation(value, where)
        if chatgpt.is_export(value):
            return chatgpt.conversation(value)
    raise FormatError(f"{where} holds something else than conversations; expected {EXPECTED}.")
