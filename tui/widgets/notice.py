"""Something the chat itself has to say inside the conversation."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from edger1.tui.clean import clean


class Notice(Static):
    """An error in plain words and what to do about it, or a quiet remark."""

    DEFAULT_CSS = """
    Notice {
        margin-bottom: 1;
        width: 1fr;
        color: $text-muted;
        &.-error {
            padding: 0 2 0 1;
            background: $error 12%;
            border-left: outer $error;
            color: $foreground;
        }
    }
    """

    @classmethod
    def error(cls, what: str, advice: str) -> Notice:
        """An error: `what` went wrong, and what the user can do."""
        content = Content.assemble((clean(what), "bold"), "\n", advice)
        return cls(content, markup=False, classes="-error")

    @classmethod
    def remark(cls, text: str) -> Notice:
        """A quiet line."""
        return cls(Content(clean(text)), markup=False)
