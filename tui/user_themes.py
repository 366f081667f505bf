"""Themes that the user wrote: one TOML file each in `EDGER1_HOME/themes`, named as the theme is.

dark = true                    # what is derived from the colours is derived for a dark screen; true where left out
primary = "#8ab4f8"            # needed; also secondary, accent, warning, error, success,
background = "#14161a"         # foreground, surface, panel, boost
[variables]                    # any of Textual's theme variables
text-muted = "#a0a6b0"
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from textual.color import Color, ColorParseError
from textual.css.constants import VALID_STYLE_FLAGS
from textual.theme import Theme

from edger1.tui.contrast import MINIMUM, TEXT, colour, readings
from edger1.tui.themes import DARK
from edger1.tui.user_files import place, read_table

COLOURS = (
    "primary", "secondary", "accent", "warning", "error", "success", "foreground", "background", "surface", "panel",
    "boost",
)  # fmt: skip
FILES_MAX = 100


@dataclass(frozen=True)
class Found:
    """The user's themes that can be used, and what has to be said about the others, a sentence each."""

    themes: tuple[Theme, ...] = ()
    problems: tuple[str, ...] = ()


def read_themes(folder: Path, taken: Collection[str] = ()) -> Found:
    """Read every theme in a folder; a file that is wrong is left out and told of. Raises nothing.

    `taken` are names that a file may not have, those of the built-in themes.
    """
    try:
        paths = sorted(path for path in folder.glob("*.toml"))
    except OSError as error:
        return Found(problems=(f"{folder} cannot be read ({(error.strerror or str(error)).lower()}).",))
    themes, problems = [], []
    for path in paths[:FILES_MAX]:
        theme, wrong = _read(path, taken)
        problems += wrong
        if theme is not None:
            themes.append(theme)
    if len(paths) > FILES_MAX:
        problems.append(f"{folder} has {len(paths)} files; the first {FILES_MAX} were read.")
    return Found(tuple(themes), tuple(problems))


def _read(path: Path, taken: Collection[str]) -> tuple[Theme | None, list[str]]:
    table, text, problems = read_table(path)
    if problems:
        return None, problems
    if path.stem in taken:
        return None, [f"{path} has the name of a built-in theme; give the file another name."]
    fields: dict[str, Any] = {}
    for key, value in table.items():
        wrong = _wrong(key, value)
        if wrong:
            problems.append(f"{place(path, text, key)}: {wrong}")
        fields[key] = value
    for name, value in _variables(table).items():
        if wrong := _wrong_variable(name, value):
            problems.append(f"{place(path, text, name)}: {wrong}")
    if "primary" not in table:
        problems.append(f'{path} sets no primary colour; a theme needs one, such as primary = "#8ab4f8".')
    if problems:
        return None, problems
    theme = Theme(name=path.stem, **fields)
    lowest = readings(theme, TEXT)[0]
    if lowest.ratio < MINIMUM:
        problems = [
            f"{path}: text on {lowest.background} has a contrast of {lowest.ratio:.1f}; below {MINIMUM} it is hard to "
            "read. The theme can be chosen nevertheless."
        ]
    return theme, problems


def _variables(table: dict[str, Any]) -> dict[str, Any]:
    variables = table.get("variables", {})
    return variables if isinstance(variables, dict) else {}


def _wrong_variable(name: str, value: Any) -> str | None:
    """Say what is wrong with a theme variable, or None. Textual ends the program over a value that it cannot read."""
    known = DARK.to_color_system().generate()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        return f"{name!r} is no theme variable." + (f" Did you mean {near[0]}?" if near else "")
    if not isinstance(value, str):
        return f"{name} is {value!r}, but a text in quotes was expected."
    if name.endswith(("-style", "-style-hover")):
        unknown = [word for word in value.split() if word not in VALID_STYLE_FLAGS]
        return f"{name} has the unknown style {unknown[0]!r}." if unknown or not value.strip() else None
    try:
        colour(value, Color.parse("black"))
    except (ColorParseError, ValueError):
        return f'{name} is {value!r}, which is no colour; write it as "#8ab4f8" or "#8ab4f8 60%".'
    return None


def _wrong(key: str, value: Any) -> str | None:
    """Say what is wrong with a setting of a theme, or None."""
    if key in COLOURS:
        if not isinstance(value, str):
            return f'{key} is {value!r}, but a colour such as "#8ab4f8" was expected.'
        try:
            Color.parse(value)
        except ColorParseError:
            return f'{key} is {value!r}, which is no colour; write it as "#8ab4f8".'
    elif key == "dark":
        if not isinstance(value, bool):
            return f"dark is {value!r}, but true or false was expected."
    elif key == "variables":
        if not isinstance(value, dict):
            return f"variables is {value!r}, but a table [variables] was expected."
    else:
        known = (*COLOURS, "dark", "variables")
        near = get_close_matches(key, known, n=1)
        return f"{key!r} is no setting of a theme. " + (
            f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
        )
    return None
