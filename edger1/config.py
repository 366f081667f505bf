"""The user's config.toml: defaults for what would otherwise be typed each time.

The file is `paths.user_config()` and every key is optional:

    memory = "6GB"          # the ceiling for model, caches and process; a size, or a share such as "50%"
    context = 8192          # tokens
    threads = 2
    theme = "textual-dark"  # of the chat
    offline = false         # true: no source is asked for anything
    model = "qwen3-8b"      # what `edger1 chat` opens: an alias, a hub repository or a path
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.errors import UsageError
from edger1.units import parse_size

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Config:
    """What config.toml sets; None leaves the choice to the program."""

    memory_bytes: int | None = None
    context: int | None = None
    threads: int | None = None
    theme: str | None = None
    offline: bool = False
    model: str = DEFAULT_MODEL


_KEYS = tuple("memory" if field.name == "memory_bytes" else field.name for field in fields(Config))


def load_config(path: Path | None = None) -> Config:
    """Read config.toml, by default the user's; a file that does not exist sets nothing.

    Raises UsageError naming file, key, what was found and what was expected.
    """
    path = path or paths.user_config()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except NotADirectoryError:
        raise UsageError(f"{path.parent} is a file; expected a folder, or none yet. EDGER1_HOME names it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Repair or remove it.") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None
    return Config(**dict(_setting(path, key, value) for key, value in table.items()))


def _setting(path: Path, key: str, value: Any) -> tuple[str, Any]:
    """Return the field of Config that `key` sets and its value, or raise UsageError."""
    if key == "memory":
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise _wrong(path, key, value, 'a size such as "6GB" or "50%"')
        try:
            return "memory_bytes", parse_size(value)
        except UsageError as error:
            raise UsageError(f"{path}: memory: {error}") from None
    if key in ("context", "threads"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _wrong(path, key, value, "a whole number of at least 1")
    elif key in ("theme", "model"):
        if not isinstance(value, str) or not value.strip():
            raise _wrong(path, key, value, "a name in quotes")
    elif key == "offline":
        if not isinstance(value, bool):
            raise _wrong(path, key, value, "true or false")
    else:
        near = get_close_matches(key, _KEYS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(_KEYS)}."
        raise UsageError(f"{path} has the unknown key {key!r}. {hint}")
    return key, value


def _wrong(path: Path, key: str, value: Any, expected: str) -> UsageError:
    return UsageError(f"{path}: {key} is {value!r}, but {expected} was expected.")
