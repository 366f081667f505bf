"""A question with yes and no."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Button, Static

from edger1.tui.clean import clean
from edger1.tui.screens.over import Over


class ConfirmScreen(Over[bool]):
    """Asks `question`; Enter on the button that has the focus, Y or N decide, Esc is no.

    `careful` puts the focus on no, for what cannot be taken back.
    """

    BINDINGS = [  # noqa: RUF012
        Binding("escape,n", "answer(False)", "No"),
        Binding("y", "answer(True)", "Yes"),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]
    DEFAULT_CSS = """
    ConfirmScreen {
        align: center middle;
        & > VerticalScroll {
            width: 56;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 1 2 0 2;
            border: round $primary;
            background: $surface;
        }
        & Horizontal { height: auto; align-horizontal: right; padding: 1 0 0 0; }
        & Button { margin: 0 0 0 2; min-width: 10; }
    }
    """

    def __init__(self, question: str, *, yes: str = "Yes", no: str = "No", careful: bool = False) -> None:
        super().__init__()
        self._question, self._yes, self._no, self._careful = question, yes, no, careful

    def compose(self) -> ComposeResult:
        """The question above, the buttons below."""
        with VerticalScroll():
            yield Static(Content(clean(self._question)), markup=False)
            with Horizontal():
                yield Button(Content(self._no), id="no", compact=True)
                yield Button(
                    Content(self._yes), id="yes", variant="error" if self._careful else "primary", compact=True
                )

    def on_mount(self) -> None:
        """Let Enter do what is harmless."""
        self.query_one("#no" if self._careful else "#yes", Button).focus()

    @on(Button.Pressed)
    def press(self, event: Button.Pressed) -> None:
        """Take the answer."""
        event.stop()
        self.dismiss(event.button.id == "yes")

    def action_answer(self, yes: bool) -> None:
        """Take the answer from a key."""
        self.dismiss(yes)
