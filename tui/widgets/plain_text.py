"""Text of any length as it was written, wrapped to the width there is.

A Static lays its whole text out for every change. This one wraps by cutting strings, keeps where each line of the
screen begins, and draws only the lines that are seen: a megabyte costs some milliseconds, and adding to the end costs
the last line.
"""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from textual.geometry import Size
from textual.selection import Selection
from textual.strip import Strip
from textual.style import Style

from edger1.tui.clean import tame
from edger1.tui.widgets.growing import Rows

TAB = 4
BAR = "│ "


class PlainText(Rows):
    """Shows cleaned text without any markup, with `bar` behind a bar at its left.

    The selection is the text without the line ends that wrapping made.
    """

    COMPONENT_CLASSES = {"plain-text--bar"}  # noqa: RUF012
    DEFAULT_CSS = """
    PlainText {
        width: 1fr;
        height: auto;
        & > .plain-text--bar { color: $accent 40%; text-style: none; }
    }
    """

    def __init__(self, text: str = "", *, bar: bool = False) -> None:
        super().__init__()
        self._bar = BAR if bar else ""
        self._lines: list[str] = []
        self._rows: list[tuple[int, int, int]] = []  # of each row of the screen: the line, and where it begins and ends
        self._wrapped_at = 0
        self._take(text)

    @property
    def text(self) -> str:
        """All of the text, as it is shown: tabs as spaces."""
        return "\n".join(self._lines)

    def append(self, text: str) -> None:
        """Add to the end."""
        rows = len(self._rows)
        self.forget(max(rows - 1, 0))
        self._take(text)
        self.refresh(layout=not self._wrapped_at or len(self._rows) != rows)

    def replace(self, text: str) -> None:
        """Show another text."""
        self._lines, self._rows = [], []
        self.forget()
        self._take(text)
        self.refresh(layout=True)

    def get_content_width(self, container: Size, viewport: Size) -> int:
        """As wide as there is room."""
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Rows of the screen at this width."""
        self._wrap(width)
        return len(self._rows)

    def draw(self, y: int, width: int, selection: Selection | None) -> Strip:
        """Draw a row of the text."""
        self._wrap(width)
        style = self.rich_style
        if y >= len(self._rows):
            return Strip.blank(width, style)
        number, begin, end = self._rows[y]
        text = self._lines[number][begin:end]
        body = Strip(self._marked(text, number, begin, selection)).apply_offsets(begin, number)
        if self._bar:
            look = self.get_component_rich_style("plain-text--bar")
            body = Strip.join([Strip([Segment(self._bar, look)]), body])
        return body.adjust_cell_length(width, style)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Return the selected text."""
        try:
            return selection.extract(self.text), "\n"
        except IndexError:
            return None

    def _marked(self, text: str, number: int, begin: int, selection: Selection | None) -> list[Segment]:
        style = self.rich_style
        span = None if selection is None else selection.get_span(number)
        if span is None:
            return [Segment(text, style)]
        chosen = Style.from_styles(self.screen.get_component_styles("screen--selection"))
        left = min(max(span[0] - begin, 0), len(text))
        right = len(text) if span[1] < 0 else min(max(span[1] - begin, left), len(text))
        parts = ((text[:left], style), (text[left:right], style + chosen.rich_style), (text[right:], style))
        return [Segment(part, look) for part, look in parts if part]

    def _take(self, text: str) -> None:
        if not text:
            return
        first, *others = tame(text).expandtabs(TAB).split("\n")
        added = len(self._lines) - 1
        if self._lines:
            self._lines[-1] += first
            self._lines += others
        else:
            self._lines, added = [first, *others], 0
        if self._wrapped_at:
            # How a line is cut does not depend on what follows its last row.
            begin = self._rows.pop()[1] if self._rows and self._rows[-1][0] == added else 0
            self._wrap_from(added, begin)

    def _wrap(self, width: int) -> None:
        if width != self._wrapped_at:
            self._wrapped_at = width
            self._rows.clear()
            self._wrap_from(0, 0)

    def _wrap_from(self, number: int, begin: int) -> None:
        width = max(self._wrapped_at - len(self._bar), 1)
        for at, line in enumerate(self._lines[number:], number):
            if len(line) <= width and line.isascii():
                self._rows.append((at, begin if at == number else 0, len(line)))
            else:
                self._rows += rows_of(line, at, begin if at == number else 0, width)


def rows_of(line: str, number: int, begin: int, width: int) -> list[tuple[int, int, int]]:
    """Cut a line into rows of at most `width` cells and as many characters, between words where there are any."""
    rows = []
    narrow = line.isascii()
    while True:
        end = min(begin + width, len(line))
        if not narrow:
            while end > begin + 1 and (over := cell_len(line[begin:end]) - width) > 0:
                end = max(begin + 1, end - max(over // 2, 1))
        if end < len(line) and line[end] != " ":
            space = line.rfind(" ", begin, end)
            # A row of blanks only would hide where an indented word begins.
            end = space + 1 if space > begin and line[begin:space].strip() else end
        rows.append((number, begin, end))
        if end < len(line) and line[end] == " ":
            end += 1
        begin = end
        if begin >= len(line):
            return rows
