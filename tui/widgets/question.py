"""What the user said."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from edger1.tui.clean import clean
from edger1.tui.tree import Attachment, Node
from edger1.tui.widgets.plain_text import PlainText
from edger1.tui.widgets.turn import Turn


class Question(Turn):
    """One message of the user, as it was typed."""

    DEFAULT_CSS = """
    Question {
        & > Vertical {
            height: auto;
            padding: 0 2 0 1;
            background: $surface;
            border-left: outer $primary;
        }
        & > Vertical > Static { color: $text-muted; width: 1fr; text-overflow: ellipsis; text-wrap: nowrap; }
        & > TurnFoot { padding: 0 2; }
        &.-waiting > Vertical { color: $text-muted; border-left: outer $secondary 60%; }
        &:focus > Vertical { background: $panel; }
    }
    """

    def __init__(self, node: Node, waiting: bool = False) -> None:
        super().__init__(node, classes="-waiting" if waiting else None)

    @property
    def text(self) -> str:
        """What was typed."""
        return self.node.text

    def compose(self) -> ComposeResult:
        """What goes with the message, and the message."""
        with Vertical():
            for each in self.node.attachments:
                yield Static(Content(_named(each)), markup=False)
            yield PlainText(clean(self.node.text))
        yield self.foot

    def sent(self) -> None:
        """The message is no longer waiting for the engine."""
        self.remove_class("-waiting")


def _named(each: Attachment) -> str:
    size = f"{len(each.text.splitlines()):,} lines" if each.tokens is None else f"{each.tokens:,} tokens"
    return f"+ {clean(each.name)} · {size}"
