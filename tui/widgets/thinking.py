"""The reasoning of one answer: open while it comes, folded when the answer begins."""

from __future__ import annotations

from collections.abc import Callable

from textual.app import ComposeResult
from textual.binding import Binding
from textual.content import Content
from textual.reactive import reactive
from textual.selection import Selection
from textual.widgets import Static

from edger1.tui.clean import clean
from edger1.tui.figures import duration
from edger1.tui.pacing import Pacer
from edger1.tui.widgets.growing import Growing
from edger1.tui.widgets.plain_text import PlainText


class ThinkingTitle(Static, can_focus=True):
    """The line that folds and unfolds the reasoning, with the mouse or with Enter."""

    ALLOW_SELECT = False
    FOCUS_ON_CLICK = False
    BINDINGS = [Binding("enter,space", "fold", "Fold", show=False)]  # noqa: RUF012
    DEFAULT_CSS = """
    ThinkingTitle {
        width: auto;
        color: $accent;
        pointer: pointer;
        &:hover, &:focus { text-style: underline; }
    }
    """

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Nothing here was said by anybody."""
        return None

    def on_click(self) -> None:
        """Fold or unfold."""
        self.action_fold()

    def action_fold(self) -> None:
        """Fold or unfold."""
        self.query_ancestor(Thinking).toggle()


class Thinking(Growing):
    """A collapsible block of plain text. Reasoning is long and rough: it is shown as it comes, without Markdown.

    The text of a folded block is laid out when it is opened. `text`, `took_s` and `tokens` are of reasoning that is
    over; without them it is fed, and `opened` tells whether it is open meanwhile.
    """

    DEFAULT_CSS = """
    Thinking {
        height: auto;
        margin-bottom: 1;
        & > PlainText {
            margin-top: 1;
            color: $text-muted;
            text-style: italic;
        }
        &.-folded > PlainText { display: none; }
    }
    """

    folded: reactive[bool] = reactive(False, init=False)

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        opened: bool = True,
        text: str | None = None,
        took_s: float | None = None,
        tokens: int = 0,
    ) -> None:
        super().__init__()
        self._pacer = Pacer(self._show)
        self._clock = clock
        self._over = text is not None
        self._took_s = took_s
        self._tokens = tokens
        self._began = 0.0 if self._over else clock()
        self._text = clean(text or "").strip()
        self._words = len(self._text.split())
        self._in_word = False
        self._left_to_user = False
        self.set_reactive(Thinking.folded, self._over or not opened)
        self.set_class(self.folded, "-folded")

    @property
    def took_s(self) -> float | None:
        """Seconds that it took; None while it goes on, and where nobody measured."""
        return self._took_s

    @property
    def text(self) -> str:
        """What has been shown of the reasoning, or would be if it were open."""
        return self._text

    def compose(self) -> ComposeResult:
        """The title, and the text where it is open."""
        yield ThinkingTitle(self._title())
        if not self.folded:
            yield PlainText(self._text, bar=True)

    def feed(self, text: str) -> None:
        """Take a piece of the reasoning."""
        self._pacer.feed(clean(text))

    async def finish(self) -> None:
        """The reasoning is over: say how long it took, and fold, unless the user chose otherwise. May be repeated."""
        if self._over:
            return
        self._over = True
        self._took_s = self._clock() - self._began
        await self._pacer.drain()
        trimmed = self._text.rstrip()
        if trimmed != self._text:
            self._text = trimmed
            for body in self.query(PlainText):
                body.replace(trimmed)
        if not self._left_to_user:
            self.folded = True
        self._retitle()

    def count(self, tokens: int) -> None:
        """Say how many tokens it has, once that is known; 0: nobody counted."""
        if tokens != self._tokens:
            self._tokens = tokens
            self._retitle()

    def resume(self) -> None:
        """More of it is going to come; its time goes on from what it took so far."""
        self._began = self._clock() - (self._took_s or 0.0)
        self._over, self._took_s = False, None
        self._retitle()

    def toggle(self) -> None:
        """Fold or unfold because the user wants it so; it stays like that."""
        self._left_to_user = True
        self.folded = not self.folded

    def watch_folded(self, folded: bool) -> None:
        """Follow the fold."""
        self.set_class(folded, "-folded")
        if self.is_mounted and not folded and not self.query(PlainText):
            self.mount(PlainText(self._text, bar=True))
        self._retitle()

    async def _show(self, text: str) -> None:
        if not self._text:
            text = text.lstrip()
        if not text:
            return
        self._text += text
        for body in self.query(PlainText):
            body.append(text)
        # A word that began in the piece before is not counted twice.
        self._words += len(text.split()) - (self._in_word and not text[0].isspace())
        self._in_word = not text[-1].isspace()
        self._retitle()

    def _title(self) -> Content:
        mark = "▸" if self.folded else "▾"
        words = f"{self._words:,} word{'' if self._words == 1 else 's'}"
        if not self._over:
            return Content(f"{mark} Thinking · {words}")
        took = "Thought" if self._took_s is None else f"Thought for {duration(self._took_s)}"
        tokens = f" · {self._tokens:,} token{'' if self._tokens == 1 else 's'}" if self._tokens else ""
        return Content(f"{mark} {took} · {words}{tokens}")

    def _retitle(self) -> None:
        if self.is_mounted:
            self.query_one(ThinkingTitle).update(self._title())
