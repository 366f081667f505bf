"""Settings as TOML: tables read into dataclasses, and dataclasses written as tables."""

from __future__ import annotations

import json
import tomllib
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from edger1.errors import UsageError

T = TypeVar("T")
_NAMES: dict[Any, str] = {int: "whole number", float: "number", str: "text", bool: "true or false"}


def load(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises UsageError where it cannot be read or is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}.") from None


def filled(kind: type[T], name: str, table: Any, where: str) -> T:
    """Return a dataclass with the values of table [name], and its defaults for the rest.

    A field's type is that of its default; tuples are lists of texts. `where` is the file, for messages. Raises
    UsageError for an unknown key or a value of another type.
    """
    if not isinstance(table, Mapping):
        raise UsageError(f"{where} sets {name} to {table!r}; expected a table [{name}].")
    known = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise UsageError(f"{where} sets [{name}] {key}, which is no setting; known are {', '.join(known)}.")
        values[key] = _as(type(known[key]), f"{where} sets [{name}] {key}", value)
    return kind(**values)


def _as(wanted: type, where: str, value: Any) -> Any:
    if wanted is tuple:
        listed = value if isinstance(value, list | tuple) else None
        if listed is None or not all(isinstance(each, str) for each in listed):
            raise UsageError(f'{where} to {value!r}; expected a list of texts, such as ["q_proj", "v_proj"].')
        return tuple(listed)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is not types.NoneType and type(value) is not wanted:
        raise UsageError(f"{where} to {value!r}; expected a {_NAMES[wanted]}.")
    return value


def dump(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """Return tables as a file that `load` takes; values that are None are left out."""
    parts = []
    for name, table in tables.items():
        lines = [f"{key} = {value_text(value)}" for key, value in table.items() if value is not None]
        parts.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(parts) + "\n"


def value_text(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(value_text(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(name)} = {value_text(v)}" for name, v in value.items()) + "}"
    return repr(value)
