"""A conversation as text: Markdown to read, JSON to keep and to bring in again."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

from edger1.errors import FormatError
from edger1.tui.store.records import Stored
from edger1.tui.store.rows import storable
from edger1.tui.tree import Node

FORMAT = "edger1-conversation"
VERSION = 1


def to_markdown(stored: Stored, thoughts: bool = False) -> str:
    """Return the branch that is shown as Markdown; with `thoughts` what the model thought stands in quotes."""
    title = " ".join((stored.title or "Conversation").split())
    begun = datetime.fromtimestamp(stored.created_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    about = [part for part in (stored.model, begun) if part]
    parts = [f"# {title}", " · ".join(about)]
    if stored.settings.system:
        parts += ["## System", stored.settings.system.strip()]
    for node in stored.tree.path():
        parts.append(f"## {_who(node, stored.model)}")
        if thoughts and node.thought.strip():
            parts.append("\n".join(f"> {line}".rstrip() for line in node.thought.strip().splitlines()))
        for each in node.attachments:
            parts += [f"{each.name}:", fenced(each.text.rstrip("\n"))]
        if node.text.strip():
            parts.append(fenced(node.text.strip("\n")) if node.role == "tool" else node.text.strip())
        for call in node.calls:
            arguments = json.dumps(call.arguments, ensure_ascii=False, indent=1)
            parts += [f"Uses {call.name}:", fenced(arguments, "json")]
    return storable("\n\n".join(parts) + "\n")


def fenced(text: str, language: str = "") -> str:
    """Return a code block that no line of the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def to_json(stored: Stored) -> str:
    """Return the whole conversation with all its branches; `imports.read` reads it back."""
    whole: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "id": stored.id,
        "title": stored.title,
        "model": stored.model,
        "adapter": stored.adapter,
        "settings": stored.settings.to_json(),
        "pinned": stored.pinned,
        "created_at": stored.created_at,
        "updated_at": stored.updated_at,
        "head": stored.tree.head,
        "messages": [_message(node) for node in stored.tree],
    }
    return storable(json.dumps(whole, ensure_ascii=False, indent=1, default=str)) + "\n"


def _message(node: Node) -> dict[str, Any]:
    fields = asdict(node)
    always = ("id", "parent", "role", "text", "created_at")
    return {name: value for name, value in fields.items() if name in always or value not in (None, "", (), [])}


def _who(node: Node, model: str | None) -> str:
    if node.role == "user":
        return "You"
    if node.role == "tool":
        return "Tool"
    return " ".join((node.model or model or "Assistant").split())


def suggested_name(name: str) -> str:
    """Return a file name for a conversation: its words, without what file systems refuse."""
    words = re.sub(r"[^\w]+", "-", storable(name).lower()).strip("-_")[:60].strip("-_")
    return f"{words or 'conversation'}.md"


def named(typed: str) -> Path:
    """Return the path that somebody typed, with ~ for a home. Raises FormatError where there is none of that user."""
    try:
        return Path(typed.strip()).expanduser()
    except RuntimeError:
        raise FormatError(f"There is no user whose home {typed.strip().split('/')[0]} is; give a whole path.") from None


def free(folder: Path, name: str) -> Path:
    """Return a path in a folder that is not taken: NAME.md, NAME-2.md ..."""
    stem, _, ending = name.rpartition(".")
    paths = (folder / (name if at == 1 else f"{stem}-{at}.{ending}") for at in count(1))
    return next(path for path in paths if not os.path.lexists(path))


def write(stored: Stored, path: Path, *, over: bool = False) -> None:
    """Write a conversation to a file: JSON where its name ends in .json, else Markdown with the thoughts.

    Raises FormatError where the file cannot be written, and where it is there already and is not to be written `over`.
    """
    text = to_json(stored) if path.suffix.lower() == ".json" else to_markdown(stored, thoughts=True)
    try:
        with path.open("w" if over else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FormatError(f"{path} is there already; give another name.") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from error
