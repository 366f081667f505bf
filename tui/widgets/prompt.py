"""Where the user types."""

from __future__ import annotations

from textual import events
from textual.binding import Binding
from textual.message import Message
from textual.widgets import TextArea

NEWLINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")


class Prompt(TextArea):
    """A text box of several lines: Enter sends, Shift+Enter and Ctrl+J begin a new line."""

    BINDINGS = [  # noqa: RUF012
        Binding("enter", "send", "Send", key_display="⏎"),
        Binding(",".join(NEWLINE_KEYS), "newline", "New line", key_display="^j"),
        # The conversation scrolls without the focus leaving the text box.
        Binding("pageup", "app.scroll_conversation(-1)", "Scroll up", show=False),
        Binding("pagedown", "app.scroll_conversation(1)", "Scroll down", show=False),
    ]

    DEFAULT_CSS = """
    Prompt {
        height: auto;
        min-height: 3;
        max-height: 10;
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

    async def _on_key(self, event: events.Key) -> None:
        # Bindings are looked up outside the box's own queue of keys: typed fast, an Enter would overtake the letters.
        act = {"enter": self.action_send, **dict.fromkeys(NEWLINE_KEYS, self.action_newline)}.get(event.key)
        if act is None:
            await super()._on_key(event)
            return
        event.stop()
        event.prevent_default()
        act()

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
