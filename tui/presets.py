"""Named settings, kept in a file that people can read and edit: presets.toml beside config.toml.

    [careful]
    system = "Answer briefly."
    temperature = 0.2
    top_p = 0.9
    think = "on"

One table a preset; a key that is missing leaves the choice to the model. A file that cannot be read is left alone, and
what is wrong with it is said.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.errors import UsageError
from edger1.fetch.place import write_atomically
from edger1.messages import Sampling
from edger1.tui.settings import Settings, check

_DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
_OTHERS = ("system", "max_tokens", "think", "think_budget", "think_at_least", "samples", "speculate", "context_shift")
_KEYS = ("system", *_DRAWN, *_OTHERS[1:])
_MOST_LETTERS = 60


class Presets:
    """The presets of one file. `problem` says why the file cannot be used; it is not written then."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or paths.user_config().with_name("presets.toml")
        self.problem: str | None = None
        self._all: dict[str, Settings] = {}
        self.read()

    def read(self) -> None:
        """Read the file anew; another window may have written it."""
        try:
            self._all, self.problem = _read(self.path), None
        except UsageError as error:
            self._all, self.problem = {}, str(error)

    def names(self) -> list[str]:
        """Return the names of all presets in the order of the file."""
        return list(self._all)

    def get(self, name: str) -> Settings:
        """Return a preset. Raises KeyError where there is none of that name."""
        return self._all[name]

    def save(self, name: str, settings: Settings) -> None:
        """Keep settings under a name, in place of what had it. Raises UsageError where that cannot be."""
        name = name.strip()
        if not name or len(name) > _MOST_LETTERS or not name.isprintable():
            raise UsageError(f"A preset's name has 1 to {_MOST_LETTERS} printable letters.")
        check(settings)
        self._change({name: settings})

    def delete(self, name: str) -> None:
        """Remove a preset. Raises KeyError where there is none, UsageError where the file cannot be written."""
        self._all[name]
        self._change({name: None})

    def _change(self, changes: dict[str, Settings | None]) -> None:
        self.read()
        if self.problem is not None:
            raise UsageError(f"{self.problem} It is left as it is, and nothing was saved.")
        wanted = {name: kept for name, kept in (self._all | changes).items() if kept is not None}
        try:
            write_atomically(self.path, to_toml(wanted))
        except OSError as error:
            raise UsageError(f"{self.path} cannot be written: {error.strerror or error}. Nothing was saved.") from None
        self._all = wanted


def to_toml(presets: dict[str, Settings]) -> str:
    """Write presets as TOML."""
    blocks = ["# Settings that the chat knows by name. A key that is missing leaves the choice to the model.\n"]
    for name, settings in presets.items():
        lines = [f"[{_quoted(name)}]"]
        for key, value in _values(settings).items():
            if isinstance(value, str):
                lines.append(f"{key} = {_text(value)}")
            elif isinstance(value, bool):
                lines.append(f"{key} = {str(value).lower()}")
            else:
                lines.append(f"{key} = {value!r}")
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _values(settings: Settings) -> dict[str, Any]:
    usual = asdict(Settings())
    values = {**asdict(settings), **asdict(settings.sampling)}
    return {key: values[key] for key in _KEYS if values[key] is not None and values[key] != usual.get(key)}


def _quoted(text: str) -> str:
    """Return a TOML basic string; what JSON escapes means the same there, but for DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _text(text: str) -> str:
    """Return a TOML string, over several lines where it has some."""
    if "\n" not in text or "\r" in text:
        return _quoted(text)
    lines = [_quoted(line)[1:-1] for line in text.split("\n")]
    return '"""\n' + "\n".join(lines) + '"""'


def _read(path: Path) -> dict[str, Settings]:
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None
    return {name: _settings(path, name, table) for name, table in tables.items()}


def _settings(path: Path, name: str, table: Any) -> Settings:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {name} is {table!r:.100}, but a table was expected: [{name}] on a line of its own.")
    unknown = [key for key in table if key not in _KEYS]
    if unknown:
        raise UsageError(f"{path}: [{name}] has the unknown key {unknown[0]!r}. Known: {', '.join(_KEYS)}.")
    found = Settings(
        sampling=Sampling(**{key: table[key] for key in _DRAWN if key in table}),
        **{key: table[key] for key in _OTHERS if key in table},
    )
    try:
        check(found)
    except UsageError as error:
        raise UsageError(f"{path}: [{name}] {error}") from None
    return found
