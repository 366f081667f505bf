"""What a conversation on the screen consists of: messages, and remarks of the chat between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from textual.widget import Widget

from edger1.tui.tree import Node, Tree

_FIXED_ROWS = 2
"""A message's line below, and a line of space or a title."""


@dataclass(eq=False)
class Entry:
    """One message or remark; `widget` is there while it is mounted."""

    node: Node | None
    widget: Widget | None = None
    rows: int | None = None
    """How high it was when it was last laid out."""

    @property
    def kept(self) -> bool:
        """Whether its widget must stay: it cannot be made again, is being written, or has the keyboard."""
        if self.widget is None:
            return False
        from edger1.tui.widgets.answer import Answer

        coming = isinstance(self.widget, Answer) and self.widget.coming
        return self.node is None or coming or self.widget.has_focus_within or self.widget.has_class("-editing")

    def height(self, width: int) -> int:
        """Rows that it takes: measured where it was laid out once, else guessed."""
        if self.rows is not None:
            return self.rows
        if self.node is None:
            return _FIXED_ROWS
        text = self.node.text
        return _FIXED_ROWS + text.count("\n") + len(text) // max(width, 1) + 2 * bool(self.node.thought)


def shown(tree: Tree) -> list[Node]:
    """Return the messages that have a place of their own; a tool's stands with the answer that called it."""
    return [node for node in tree.path() if node.role != "tool"]


def results_of(tree: Tree | None, node: Node) -> list[Node]:
    """Return the tools' messages that answer the calls of a message."""
    if tree is None:
        return []
    ids = {call.id for call in node.calls}
    return [each for each in tree.path() if each.role == "tool" and each.call_id in ids]


def span(entries: Sequence[Entry], at: int, step: int, rows: int, width: int) -> int:
    """Return how far from `at`, upwards or downwards, entries of about `rows` rows reach: an index past the last."""
    while rows > 0 and 0 <= at < len(entries):
        rows -= entries[at].height(width)
        at += step
    return at
