"""What a reward's text says: `numeric`, `gym:countdown:weight=2`, `my.py:function:weight=0.5,key=value`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from edger1.errors import UsageError

RESERVED = ("weight", "timeout", "name", "by")

_FILE = re.compile(r"(?P<file>.+?\.py):(?P<function>[^\W\d]\w*)(?::(?P<options>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Spec:
    """One reward, as written: where it is from, its weight, and options of its own."""

    text: str
    name: str
    kind: str
    """A built-in's name, or "file"."""
    file: str = ""
    function: str = ""
    weight: float = 1.0
    timeout_s: float | None = None
    by: str | None = None
    """The reward that says whether an answer is right, for rewards that depend on it."""
    options: dict[str, Any] = field(default_factory=dict)


def parse(text: str, builtin: Mapping[str, Any]) -> Spec:
    """Read one reward. Raises UsageError for a name that is not there or an option that cannot be read."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"A reward is {text!r}; expected text such as numeric, gym:countdown or my.py:function.")
    text = text.strip()
    options: dict[str, Any]
    if match := _FILE.fullmatch(text):
        name, kind, rest = f"{match['file'].rpartition('/')[2]}:{match['function']}", "file", match["options"] or ""
        file, function, options = match["file"], match["function"], {}
    else:
        kind, _, rest = text.partition(":")
        name, file, function, options = kind, "", "", {}
        if kind == "gym":
            task, _, rest = rest.partition(":")
            if not task or "=" in task:
                raise UsageError(f'The reward "{text}" names no task; expected gym:TASK, such as gym:countdown.')
            name, options = f"gym:{task}", {"task": task}
    if kind != "file" and kind not in builtin:
        hint = " A function of yours is given as FILE.py:FUNCTION." if ".py" in text or "/" in text else ""
        raise UsageError(f'There is no reward "{kind}"; there are {", ".join(builtin)}.{hint}')
    options |= parse_options(rest, f'the reward "{text}"')
    reserved = {key: options.pop(key, None) for key in RESERVED}
    return Spec(
        text,
        str(reserved["name"] or name),
        kind,
        file,
        function,
        weight=_number(text, "weight", reserved["weight"], 1.0),
        timeout_s=_positive(text, reserved["timeout"]),
        by=None if reserved["by"] is None else str(reserved["by"]),
        options=options,
    )


def parse_options(text: str, what: str) -> dict[str, Any]:
    """Read `key=value,key=value`; values are numbers, true, false, lists in brackets, or text."""
    options: dict[str, Any] = {}
    for part in filter(str.strip, re.split(r",(?![^\[]*\])", text)):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not key.isidentifier():
            raise UsageError(f'{what[0].upper()}{what[1:]} has the option "{part}"; expected key=value.')
        if key in options:
            raise UsageError(f"{what[0].upper()}{what[1:]} has {key} twice.")
        options[key] = parse_value(value.strip())
    return options


def parse_value(text: str) -> Any:
    """Read a value: true, false, none, a number, [a, list], or else text."""
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part.strip()) for part in text[1:-1].split(",") if part.strip()]
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check_options(function: Callable[..., Any], given: Mapping[str, Any], what: str, known: set[str]) -> dict[str, Any]:
    """Return `given` as the function's keyword-only parameters take them, whole numbers made floats where floats go.

    `known` are parameters that are filled in otherwise. Raises UsageError for unknown, missing and ill-typed ones.
    """
    parameters = inspect.signature(function).parameters.values()
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in known}
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if unknown := [] if anything else sorted(given.keys() - own.keys()):
        there = ", ".join([*own, *RESERVED[:2]])
        raise UsageError(f"{what} has no option {', '.join(unknown)}; it has {there}.")
    if missing := [name for name, p in own.items() if p.default is p.empty and name not in given]:
        example = ",".join(f"{name}=..." for name in missing)
        raise UsageError(f"{what} needs {' and '.join(missing)}; write {what.split()[-1].strip(chr(34))}:{example}.")
    hints = get_type_hints(function)
    return {key: _typed(what, key, value, hints.get(key)) for key, value in given.items()}


def _typed(what: str, key: str, value: Any, kind: Any) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and not isinstance(value, str):
        return str(value)
    if kind in (int, float, bool) and type(value) is not kind:
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UsageError(f"{what} has {key}={value!r}; expected {expected}.")
    return value


def _number(text: str, key: str, value: Any, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f'The reward "{text}" has {key}={value}; expected a number.')
    return float(value)


def _positive(text: str, value: Any) -> float | None:
    if value is None:
        return None
    seconds = _number(text, "timeout", value, 0.0)
    if seconds <= 0:
        raise UsageError(f'The reward "{text}" has timeout={value}; expected seconds above 0.')
    return seconds
