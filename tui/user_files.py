"""The user's own TOML files: read, with whatever is wrong in them put in words that name file and line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

SIZE_MAX = 1_000_000
"""Bytes; a file of settings that is larger is something else."""
_PLACE = re.compile(r" \(at (?:line \d+, column \d+|end of document)\)$")


def read_text(path: Path) -> str:
    """Return a file's text. Raises ValueError that says why it cannot be had, without the path; FileNotFoundError."""
    try:
        if path.is_file() and path.stat().st_size > SIZE_MAX:
            raise ValueError(f"is larger than {SIZE_MAX:,} bytes, which no such file needs")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({(error.strerror or str(error)).lower()})") from None


def read_table(path: Path) -> tuple[dict[str, Any], str, list[str]]:
    """Return a TOML file's table, its text and what is wrong with it as sentences; the table is empty then.

    A file that is not there is an empty table. Raises nothing.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}, "", []
    except ValueError as error:
        return {}, "", [f"{path} {error}."]
    try:
        return tomllib.loads(text), text, []
    except tomllib.TOMLDecodeError as error:
        said = str(error)
        line = re.search(r"\(at line (\d+)", said)
        return {}, text, [f"{path}{f':{line[1]}' if line else ''} is not valid TOML: {_PLACE.sub('', said).lower()}."]


def line_of(text: str, key: str) -> int | None:
    """Return the number, from 1, of the line that sets a key, or None where there is none."""
    quoted = re.escape(key)
    sets = re.compile(rf"""\s*(?:"{quoted}"|'{quoted}'|{quoted})\s*=""")
    return next((number for number, line in enumerate(text.splitlines(), 1) if sets.match(line)), None)


def place(path: Path, text: str, key: str) -> str:
    """Return "file:line" of where a key is set."""
    line = line_of(text, key)
    return str(path) if line is None else f"{path}:{line}"
