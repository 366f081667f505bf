"""Reads what `export.to_json` wrote; the format is described there by what it writes."""

from __future__ import annotations

from typing import Any

from edger1.errors import FormatError
from edger1.tui.settings import Settings
from edger1.tui.store import fields, rows
from edger1.tui.store.export import FORMAT, VERSION
from edger1.tui.store.records import Stored
from edger1.tui.tree import Node

_ROLES = ("user", "assistant", "tool")


def is_ours(value: dict[str, Any]) -> bool:
    """Whether a value says that EdgeR1 wrote it."""
    return value.get("format") == FORMAT


def conversation(value: dict[str, Any], where: str) -> Stored:
    """Return the conversation of a value. Raises FormatError where a part that is needed is missing."""
    version = value.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise FormatError(f"{where} was written by a newer EdgeR1 (version {version}); update this one to read it.")
    id_ = value.get("id")
    if not isinstance(id_, str) or not 0 < len(id_) <= 100:
        raise FormatError(f"{where} has a conversation without an id.")
    nodes = [_node(each, where) for each in fields.listed(value.get("messages"))]
    head = value.get("head")
    settings = value.get("settings")
    begun = fields.moment(value.get("created_at"))
    return Stored(
        rows.storable(id_),
        fields.text(value.get("title")) or None,
        rows.to_tree(nodes, head if isinstance(head, str) else None),
        rows.to_settings(rows.dumped(settings)) if isinstance(settings, dict) else Settings(),
        fields.text(value.get("model")) or None,
        fields.text(value.get("adapter")) or None,
        value.get("pinned") is True,
        begun,
        fields.moment(value.get("updated_at"), begun),
    )


def _node(value: Any, where: str) -> Node:
    found = fields.mapping(value)
    id_, role = found.get("id"), found.get("role")
    if not isinstance(id_, str) or not 0 < len(id_) <= 100 or role not in _ROLES:
        raise FormatError(f"{where} has a message without an id or with the role {str(role)[:40]!r}.")
    seconds = found.get("thought_s")
    figures = found.get("figures")
    call_id = found.get("call_id")
    parent = found.get("parent")
    return Node(
        role,
        fields.text(found.get("text")),
        rows.storable(id_),
        rows.storable(parent) if isinstance(parent, str) else None,
        fields.moment(found.get("created_at")),
        fields.text(found.get("thought")),
        float(seconds) if isinstance(seconds, int | float) and abs(seconds) < 1e9 else None,
        fields.text(found.get("model")) or None,
        fields.text(found.get("finish")) or None,
        figures if isinstance(figures, dict) else None,
        rows.attachments_from_json(rows.dumped(found.get("attachments"))),
        rows.calls_from_json(rows.dumped(found.get("calls"))),
        call_id if isinstance(call_id, str) else None,
    )
