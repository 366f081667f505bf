"""A text that may be very long: its first lines, and more of them when asked for."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

LINES = 40
LINE_MAX = 2_000
"""Characters of a line; a longer one goes on in the next, so that a page is never huge."""


def cut_lines(lines: Sequence[Content]) -> list[Content]:
    """Cut lines that are too long into several."""
    whole: list[Content] = []
    for line in lines:
        at = 0
        while len(line) - at > LINE_MAX:
            whole.append(line[at : at + LINE_MAX])
            at += LINE_MAX
        whole.append(line[at:] if at else line)
    return whole


class More(Static, can_focus=True):
    """The line that asks for the next page, with the mouse or with Enter."""

    ALLOW_SELECT = False
    BINDINGS = [Binding("enter,space", "more", "More", show=False)]  # noqa: RUF012
    DEFAULT_CSS = """
    More {
        width: auto;
        color: $accent;
        pointer: pointer;
        &:hover, &:focus { text-style: underline; }
    }
    """

    async def on_click(self) -> None:
        """Show more."""
        await self.action_more()

    async def action_more(self) -> None:
        """Show more."""
        await self.query_ancestor(Paged).more()


class Paged(Vertical):
    """Lines of text, a page at a time; what is not asked for is never laid out."""

    DEFAULT_CSS = """
    Paged { height: auto; }
    """

    def __init__(self, lines: Sequence[Content], classes: str = "", page: int = LINES) -> None:
        super().__init__(classes=classes)
        self._lines = cut_lines(lines)
        self._page = page
        self._shown = 0

    def compose(self) -> ComposeResult:
        """The first page, and the way to the next."""
        yield self._next()
        if self._left:
            yield More(self._more_text())

    async def more(self) -> None:
        """Show the next page."""
        more = self.query_one(More)
        await self.mount(self._next(), before=more)
        if self._left:
            more.update(self._more_text())
        else:
            await more.remove()

    @property
    def _left(self) -> int:
        return len(self._lines) - self._shown

    def _next(self) -> Static:
        page = self._lines[self._shown : self._shown + self._page]
        self._shown += len(page)
        return Static(Content("\n").join(page), markup=False)

    def _more_text(self) -> Content:
        return Content(f"▾ {self._left:,} more lines")
