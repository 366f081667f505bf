"""Where the user types."""

from __future__ import annotations

from textual.binding import Binding
from textual.message import Message
from textual.widgets import TextArea


class Prompt(TextArea):
    """A text box of several lines: Enter sends, Shift+Enter and Ctrl+J begin a new line."""

    BINDINGS = [  # noqa: RUF012
        Binding("enter", "send", "Send", key_display="⏎", priority=True),
        Binding("ctrl+j,shift+enter,alt+enter", "newline", "New line", key_display="^j", priority=True),
        # The conversation scrolls without the focus leaving the text box.
        Binding("pageup", "app.scroll_conversation(-1)", "Scroll up", show=False, priority=True),
        Binding("pagedown", "app.scroll_conversation(1)", "Scroll down", show=False, priority=True),
    ]

    DEFAULT_CSS = """
    Prompt {
        height: auto;
        min-height: 3;
        max-height: 10;
        margin: 0 1;
        padding: 0 1;
        border: round $secondary 50%;
        background: $background;
        scrollbar-size-vertical: 1;
        &:focus { border: round $primary; }
        & .text-area--cursor-line { background: transparent; }
        .-short & { max-height: 5; }
    }
    """

    class Submitted(Message):
        """The user wants to send `text`, which stays in the box until it is taken."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def __init__(self) -> None:
        super().__init__(placeholder="Ask anything", highlight_cursor_line=False)
        # A blinking cursor is a timer that wakes an idle machine twice a second.
        self.cursor_blink = False

    def action_send(self) -> None:
        """Offer the text for sending, unless there is none."""
        text = self.text.strip()
        if text:
            self.post_message(self.Submitted(text))

    def action_newline(self) -> None:
        """Begin a new line."""
        self.insert("\n")

    def give_back(self, text: str) -> None:
        """Put a message that was not answered back, before what has been typed since."""
        draft = self.text
        self.text = f"{text}\n\n{draft}" if draft.strip() else text
        self.move_cursor(self.document.end)
