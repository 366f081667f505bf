"""What the user said."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Static

from edger1.tui.clean import clean


class Question(Static):
    """One message of the user, as it was typed."""

    DEFAULT_CSS = """
    Question {
        margin-bottom: 1;
        padding: 0 2 0 1;
        width: 1fr;
        background: $surface;
        border-left: outer $primary;
        &.-waiting { color: $text-muted; border-left: outer $secondary 60%; }
    }
    """

    def __init__(self, text: str, waiting: bool = False) -> None:
        super().__init__(Content(clean(text)), markup=False, classes="-waiting" if waiting else "")
        self.text = text

    def sent(self) -> None:
        """The message is no longer waiting for the engine."""
        self.remove_class("-waiting")
