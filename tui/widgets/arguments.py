"""What a call is given, readable and exact: nothing in it is hidden, and nothing in it is acted on."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from textual.content import Content

BAR = "  │ "
_HIDDEN = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


def reveal(text: str) -> Content:
    """Return one line with every character that a screen does not show as its escape, marked as such.

    Unlike `clean`, which removes such characters, this is for what is about to run: two different texts look different.
    """
    parts: list[Content | str | tuple[str, str]] = []
    plain: list[str] = []
    for each in text:
        if (each.isascii() and each.isprintable()) or unicodedata.category(each) not in _HIDDEN:
            plain.append(each)
            continue
        if plain:
            parts.append("".join(plain))
            plain = []
        parts.append((each.encode("unicode_escape", "surrogatepass").decode(), "$warning reverse"))
    parts.append("".join(plain))
    return Content.assemble(*parts)


def argument_lines(arguments: dict[str, Any]) -> list[Content]:
    """Return one or more lines for each argument: JSON, but a text of several lines as a block of its lines."""
    lines: list[Content] = []
    for name, value in arguments.items():
        label = Content.assemble(reveal(name).stylize("$text-primary"), ": ")
        if isinstance(value, str) and "\n" in value:
            lines.append(label)
            lines += [Content.assemble((BAR, "$secondary"), reveal(line)) for line in value.split("\n")]
            continue
        said = json.dumps(value, ensure_ascii=False, indent=2)
        if len(said) <= 72:
            said = json.dumps(value, ensure_ascii=False)
        first, *rest = said.split("\n")
        lines.append(Content.assemble(label, reveal(first)))
        lines += [Content.assemble("  ", reveal(line)) for line in rest]
    return lines or [Content("no arguments").stylize("$secondary")]


def summary(arguments: dict[str, Any], limit: int = 200) -> Content:
    """Return the arguments on one line, the longer ones cut."""
    parts = []
    for name, value in arguments.items():
        said = json.dumps(value, ensure_ascii=False)
        parts.append(f"{name}={said if len(said) <= 40 else said[:39] + '…'}")
    joined = ", ".join(parts)
    return reveal(joined if len(joined) <= limit else joined[: limit - 1] + "…")
