"""The keys, on one screen."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

KEYS = (
    ("Enter", "send"),
    ("Shift+Enter, Ctrl+J", "new line"),
    ("Esc", "stop; what was said stays"),
    ("Ctrl+T", "fold or unfold the reasoning"),
    ("Page Up, Page Down", "scroll the conversation"),
    ("Ctrl+N", "new conversation"),
    ("/adapter DIR|off", "put an adapter over the model"),
    ("Ctrl+P", "all commands, and themes"),
    ("Ctrl+C", "copy a selection, else quit"),
    ("Ctrl+Q", "quit"),
)


class Help(ModalScreen[None]):
    """Lists the keys; F1 or Esc closes it."""

    BINDINGS = [Binding("escape,f1,enter", "dismiss", "Close")]  # noqa: RUF012
    DEFAULT_CSS = """
    Help {
        align: center middle;
        & > VerticalScroll {
            width: 64;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 1 2;
            .-short & { padding: 0 1; }
            border: round $primary;
            background: $surface;
        }
    }
    """

    def compose(self) -> ComposeResult:
        """The table of keys."""
        wide = max(len(keys) for keys, _ in KEYS) + 3
        lines = [Content.assemble((keys.ljust(wide), "$text-primary"), what) for keys, what in KEYS]
        with VerticalScroll() as box:
            box.border_title = "Keys"
            yield Static(Content("\n").join(lines))
