"""The reasoning of one answer: open while it comes, folded when the answer begins."""

from __future__ import annotations

from collections.abc import Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Static

from edger1.tui.clean import clean
from edger1.tui.figures import duration
from edger1.tui.pacing import Pacer

PIECE_MAX = 2_000
"""Characters of one piece of the text: an update lays out the last piece anew, not the whole."""


class ThinkingTitle(Static, can_focus=True):
    """The line that folds and unfolds the reasoning, with the mouse or with Enter."""

    ALLOW_SELECT = False
    BINDINGS = [Binding("enter,space", "fold", "Fold", show=False)]  # noqa: RUF012
    DEFAULT_CSS = """
    ThinkingTitle {
        width: auto;
        color: $accent;
        pointer: pointer;
        &:hover, &:focus { text-style: underline; }
    }
    """

    def on_click(self) -> None:
        """Fold or unfold."""
        self.action_fold()

    def action_fold(self) -> None:
        """Fold or unfold."""
        self.query_ancestor(Thinking).toggle()


class Thinking(Widget):
    """A collapsible block of plain text. Reasoning is long and rough: it is shown as it comes, without Markdown."""

    DEFAULT_CSS = """
    Thinking {
        height: auto;
        margin-bottom: 1;
        & > Vertical {
            height: auto;
            margin-top: 1;
            padding-left: 1;
            border-left: solid $accent 40%;
        }
        & > Vertical > Static { color: $text-muted; text-style: italic; }
        &.-folded > Vertical { display: none; }
    }
    """

    folded: reactive[bool] = reactive(False)

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._pacer = Pacer(self._show)
        self._clock = clock
        self._began = clock()
        self._took_s: float | None = None
        self._words = 0
        self._in_word = False
        self._last = ""
        self._left_to_user = False

    def compose(self) -> ComposeResult:
        """The title, and room for the pieces of text."""
        yield ThinkingTitle()
        yield Vertical()

    def on_mount(self) -> None:
        """Show the title."""
        self._retitle()

    def feed(self, text: str) -> None:
        """Take a piece of the reasoning."""
        self._pacer.feed(clean(text))

    async def finish(self) -> None:
        """The reasoning is over: say how long it took, and fold, unless the user chose otherwise. May be repeated."""
        if self._took_s is not None:
            return
        self._took_s = self._clock() - self._began
        await self._pacer.drain()
        if self._last:
            self.query_one(Vertical).query(Static).last().update(Content(self._last.rstrip()))
        if not self._left_to_user:
            self.folded = True
        self._retitle()

    def toggle(self) -> None:
        """Fold or unfold because the user wants it so; it stays like that."""
        self._left_to_user = True
        self.folded = not self.folded

    def watch_folded(self, folded: bool) -> None:
        """Follow the fold."""
        self.set_class(folded, "-folded")
        self._retitle()

    async def _show(self, text: str) -> None:
        body = self.query_one(Vertical)
        if not self._last:
            text = text.lstrip()
        if not text:
            return
        if not self._last or (len(self._last) > PIECE_MAX and "\n" in self._last):
            # The end of the last line belongs to the new piece, so that a line is never cut in two.
            kept, _, tail = self._last.rpartition("\n")
            if self._last:
                body.query(Static).last().update(Content(kept))
            self._last = tail + text
            await body.mount(Static(Content(self._last), markup=False))
        else:
            self._last += text
            body.query(Static).last().update(Content(self._last))
        # A word that began in the piece before is not counted twice.
        self._words += len(text.split()) - (self._in_word and not text[0].isspace())
        self._in_word = not text[-1].isspace()
        self._retitle()

    def _retitle(self) -> None:
        if not self.is_mounted:
            return
        mark = "▸" if self.folded else "▾"
        if self._took_s is None:
            title = f"{mark} Thinking · {self._words:,} words"
        else:
            title = f"{mark} Thought for {duration(self._took_s)} · {self._words:,} words"
        self.query_one(ThinkingTitle).update(Content(title))
