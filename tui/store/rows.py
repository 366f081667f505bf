"""Messages and settings as rows of the database, and back. What cannot be read of a row is left out, never raised."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from edger1.tui.settings import Settings
from edger1.tui.store import fields, index
from edger1.tui.store.records import Summary
from edger1.tui.tree import Attachment, Call, Node, Tree

_SURROGATES = re.compile("[\ud800-\udfff]")

COLUMNS = "id, parent, role, text, thought, created_at, thought_s, model, finish, figures, attachments, calls, call_id"


def storable(text: str) -> str:
    """Return a text that UTF-8 can hold: what a model breaks off in the middle of a character cannot."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def optional(text: str | None) -> str | None:
    """Return `storable` of what may be missing."""
    return None if text is None else storable(text)


def to_row(node: Node) -> dict[str, Any]:
    """Return a message's columns."""
    return {
        "id": node.id,
        "parent": node.parent,
        "role": node.role,
        "text": storable(node.text),
        "thought": storable(node.thought),
        "created_at": node.created_at,
        "thought_s": node.thought_s,
        "model": optional(node.model),
        "finish": node.finish,
        "figures": None if node.figures is None else dumped(node.figures),
        "attachments": attachments_to_json(node.attachments),
        "calls": dumped([asdict(call) for call in node.calls]) if node.calls else None,
        "call_id": optional(node.call_id),
    }


def to_node(row: tuple[Any, ...]) -> Node:
    """Return the message of a row with the columns `COLUMNS`."""
    (id_, parent, role, text, thought, created_at, thought_s, model, finish, figures, attachments, calls, call_id) = row
    return Node(
        role if role in ("user", "assistant", "tool") else "user",
        fields.text(text),
        fields.text(id_),
        parent,
        fields.number(created_at, 0.0),
        fields.text(thought),
        None if thought_s is None else fields.number(thought_s, 0.0),
        fields.text(model) or None,
        fields.text(finish) or None,
        found if figures and isinstance(found := loaded(figures), dict) else None,
        attachments_from_json(attachments),
        calls_from_json(calls),
        fields.text(call_id) or None,
    )


def to_summary(row: tuple[Any, ...]) -> Summary:
    """Return a conversation of a list, of a row with its columns and how its first question begins."""
    id_, title, model, pinned, updated_at, count, asked = row
    return Summary(
        id_,
        fields.text(title) or None,
        fields.text(model) or None,
        bool(pinned),
        fields.number(updated_at, 0.0),
        count,
        index.begins(asked),
    )


def to_tree(nodes: Iterable[Node], head: str | None) -> Tree:
    """Return the tree of a conversation's messages; one whose parent is missing begins a branch."""
    known: set[str] = set()
    whole = []
    for node in nodes:
        if node.parent not in known:
            node.parent = None
        known.add(node.id)
        whole.append(node)
    return Tree(whole, head)


def attachments_to_json(attachments: Iterable[Attachment]) -> str | None:
    """Return attachments as a column; None where there are none."""
    listed = [asdict(each) for each in attachments]
    return dumped(listed) if listed else None


def attachments_from_json(text: str | None) -> tuple[Attachment, ...]:
    """Return what `attachments_to_json` wrote."""
    found = loaded(text) if text else None
    if not isinstance(found, list):
        return ()
    return tuple(
        Attachment(
            each["name"],
            each["text"],
            path if isinstance(path := each.get("path"), str) else None,
            tokens if isinstance(tokens := each.get("tokens"), int) else None,
        )
        for each in found
        if isinstance(each, dict) and isinstance(each.get("name"), str) and isinstance(each.get("text"), str)
    )


def calls_from_json(text: str | None) -> tuple[Call, ...]:
    """Return the calls of a column."""
    found = loaded(text) if text else None
    if not isinstance(found, list):
        return ()
    return tuple(
        Call(str(each["id"]), str(each["name"]), each["arguments"] if isinstance(each["arguments"], dict) else {})
        for each in found
        if isinstance(each, dict) and {"id", "name", "arguments"} <= each.keys()
    )


def to_settings(text: str) -> Settings:
    """Return the settings of a row; those that cannot be read are the plain ones."""
    found = loaded(text)
    try:
        return Settings.from_json(found) if isinstance(found, dict) else Settings()
    except (TypeError, ValueError, AttributeError):
        return Settings()


def dumped(value: Any) -> str:
    """Return a value as JSON, whatever a figure's type is."""
    return json.dumps(value, default=str)


def loaded(text: str) -> Any:
    """Return the value of a JSON text, None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        return None
