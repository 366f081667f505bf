"""The Markdown of one answer, drawn while it is written.

One widget draws the whole text by lines: what an update costs does not depend on what stands above the block that is
being written. A block is parsed and laid out until the one after it is known to be another; then it is settled, and is
never looked at again. Link reference definitions are off, so nothing that comes later can change it, and what streaming
has drawn is what a full render would draw.
"""

from __future__ import annotations

import asyncio
import time

from markdown_it.token import Token
from rich.segment import Segment
from textual.content import Content
from textual.geometry import Region, Size
from textual.highlight import (
    ANSIDarkHighlightTheme,
    ANSILightHighlightTheme,
    HighlightTheme,
    highlight,
)
from textual.selection import Selection
from textual.strip import Strip
from textual.style import Style

from edger1.tui.clean import clean
from edger1.tui.drawing import Drawing, Line
from edger1.tui.markdown import parser, top_blocks, weight
from edger1.tui.widgets.growing import Rows
from edger1.tui.widgets.plain_text import TAB, rows_of
from edger1.tui.widgets.turn import CodeCopied

COLOUR_SHARE = 0.02
"""Share of a core that colouring code takes while it is written; what has come since is plain until the next time."""
COLOUR_LATEST_S = 1.0
CODE = ("fence", "code_block")
SETTLED_LINES = 2
"""Whole lines after which nothing that follows can make a block part of the one before it (a table's head has two)."""


class AnswerText(Rows):
    """Markdown from a model: nothing in it is executed, and a link only tells its address.

    The selection is the text as it is read: without marks, and without the line ends that wrapping made.
    """

    DEFAULT_CSS = """
    AnswerText { width: 1fr; height: auto; margin-bottom: 1; color: $foreground; }
    """

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.source = ""
        """All of the text, as it was written."""
        self._parser = parser()
        self._settled: list[list[Token]] = []
        self._settled_weight = 0
        self._settled_lines = 0
        self._tail: list[list[Token]] = []
        self._tail_at = 0  # where what is not settled begins in `source`
        self._drawing: Drawing | None = None
        self._rows: list[tuple[int, int, int]] = []  # of each row: the line, and where it begins and ends
        self._inks: dict[str, Content] = {}  # colours of code that is not settled, or of the beginning of it
        self._wanted: tuple[str, str, bool] | None = None
        """The first code that waits for its colours, its language, and whether more of it may come."""
        self._colour_at = 0.0
        self._colouring: asyncio.Task[None] | None = None
        self._coming = False
        if text:
            self._take(text)

    # What is written

    def append(self, text: str) -> None:
        """Add to the end."""
        self._coming = True
        rows = len(self._rows)
        first = self._take(text)
        due = self._wanted is not None and (not self._wanted[2] or time.monotonic() >= self._colour_at)
        if due and self._colouring is None:
            self._colouring = asyncio.create_task(self._colour())
        width = self.content_size.width
        if self._drawing is None or len(self._rows) != rows:
            self.refresh(layout=True)
        else:
            self.refresh(Region(0, first, width, rows - first))

    async def finish(self) -> None:
        """Nothing more comes for now: return when all code has its colours."""
        while self._wanted is not None and self.is_attached:
            if self._colouring is None:
                self._colouring = asyncio.create_task(self._colour())
            task = self._colouring
            await asyncio.wait([task])
            if task.cancelled() or task.exception() is not None:
                # The text stands without its colours.
                break
        self._coming = False

    def _take(self, text: str) -> int:
        """Parse what is not settled, and return the first row that may have changed."""
        self.source += text
        tail = self.source[self._tail_at :]
        blocks = top_blocks(self._parser.parse(tail, {"blocks": self._settled_weight}))
        starts = [block[0].map[0] if block[0].map else 0 for block in blocks]
        whole = tail.count("\n")
        keep = 1 if starts and starts[-1] + SETTLED_LINES <= whole else 2
        done = max(0, len(blocks) - keep)
        if self._coming:
            # Code gets its colours meanwhile, in a thread: a settled block is not drawn again.
            done = next((at for at in range(done) if any(map(self._plain, blocks[at]))), done)
        new, self._tail = blocks[:done], blocks[done:]
        if new:
            self._settled += new
            self._settled_weight += sum(map(weight, new))
            self._tail_at += _offset(tail, starts[done])
        return self._draw_tail(new)

    # How it is laid out

    def _draw_tail(self, settled: list[list[Token]] | None = None) -> int:
        drawing = self._drawing
        if drawing is None:
            return 0
        self._wanted = None
        lines = self._settled_lines
        del drawing.lines[lines:]
        while self._rows and self._rows[-1][0] >= lines:
            self._rows.pop()
        first = len(self._rows)
        if settled:
            drawing.add(settled)
            self._settled_lines = len(drawing.lines)
        drawing.add(self._tail)
        self._wrap(lines)
        self.forget(first)
        return first

    def _lay_out(self, width: int) -> None:
        if self._drawing is None or self._drawing.width != width:
            self._drawing = Drawing(width, self._coloured)
            self._drawing.add(self._settled)
            self._settled_lines = len(self._drawing.lines)
            self._rows.clear()
            self.forget()
            self._wrap(0)
            self._draw_tail()

    def _wrap(self, first: int) -> None:
        assert self._drawing is not None
        for number, line in enumerate(self._drawing.lines[first:], first):
            width = max(1, self._drawing.width - max(line.first.cell_length, line.rest.cell_length))
            text = line.text.plain
            if len(text) <= width and text.isascii():
                self._rows.append((number, 0, len(text)))
            else:
                self._rows += rows_of(text, number, 0, width)

    def _plain(self, token: Token) -> bool:
        return token.type in CODE and bool(_language(token)) and _code(token) not in self._inks

    def _coloured(self, token: Token, code: str) -> Content:
        language = _language(token)
        if not language:
            return Content(code)
        look, found = token.meta.get("ink", (self._look, self._inks.get(code)))
        if look is not self._look or (found is None and not self._coming):
            found = _highlight(code, language, self._look)
        if found is not None:
            token.meta["ink"] = (self._look, found)
            return found
        self._wanted = self._wanted or (code, language, any(token is each for each in self._tail[-1]))
        before = max((each for each in self._inks if code.startswith(each)), key=len, default="")
        return Content(code, list(self._inks[before].spans) if before else [])

    @property
    def _look(self) -> type[HighlightTheme]:
        if not self.app.native_ansi_color:
            return HighlightTheme
        return ANSIDarkHighlightTheme if self.app.current_theme.dark else ANSILightHighlightTheme

    async def _colour(self) -> None:
        """Colour code that waits for it, and draw it so; the text may go on meanwhile."""
        more = False
        try:
            while self._wanted is not None and not (more and self._wanted[2]):
                code, language, more = self._wanted
                began = time.monotonic()
                ink = await asyncio.to_thread(_highlight, code, language, self._look)
                self._colour_at = time.monotonic() + min((time.monotonic() - began) / COLOUR_SHARE, COLOUR_LATEST_S)
                tails = [_code(token) for block in self._tail for token in block if token.type in CODE]
                self._inks = {
                    text: each
                    for text, each in (self._inks | {code: ink}).items()
                    if any(tail.startswith(text) for tail in tails)
                }
                rows = len(self._rows)
                first = self._draw_tail()
                self.refresh(Region(0, first, self.content_size.width, rows - first))
        finally:
            self._colouring = None

    def get_content_width(self, container: Size, viewport: Size) -> int:
        """As wide as there is room."""
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Rows of the screen at this width."""
        self._lay_out(width)
        return len(self._rows)

    # How it is drawn

    def draw(self, y: int, width: int, selection: Selection | None) -> Strip:
        """Draw a row of the layout."""
        self._lay_out(width)
        if y >= len(self._rows) or self._drawing is None:
            return Strip.blank(width, self.rich_style)
        number, begin, end = self._rows[y]
        line = self._drawing.lines[number]
        base = self.visual_style + Style.parse(line.ground) if line.ground else self.visual_style
        text = line.text
        span = selection.get_span(number) if selection is not None and line.said else None
        if span is not None:
            chosen = Style.from_styles(self.screen.get_component_styles("screen--selection"))
            text = text.stylize(chosen, span[0], len(text.plain) if span[1] < 0 else span[1])
        if line.code is not None:
            text = text.stylize(Style.from_meta({"@click": f"copy_code({number})"}))
        before = Strip(_segments(line.first if begin == 0 else line.rest, base))
        body = Strip(_segments(text[begin:end], base))
        if line.said:
            body = body.apply_offsets(begin, number)
        outer = base if line.ground else self.visual_style
        return Strip.join([before, body]).adjust_cell_length(width, outer.rich_style)

    # What the user does

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Return the selected text."""
        parts = []
        for number, line in enumerate(self._drawing.lines if self._drawing is not None else []):
            span = selection.get_span(number) if line.said else None
            if span is not None:
                begin, end = span
                text = line.text.plain if end < 0 else line.text.plain[:end]
                parts.append((line.mark if begin == 0 else "") + text[begin:])
        return ("\n".join(parts), "\n") if parts else None

    def action_copy_code(self, number: int) -> None:
        """Copy the code block whose title was clicked."""
        lines: list[Line] = self._drawing.lines if self._drawing is not None else []
        code = lines[number].code if number < len(lines) else None
        if code is not None:
            self.post_message(CodeCopied(code))

    def action_link(self, address: str) -> None:
        """Show where a link leads, and leave going there to the user."""
        address = clean(address)
        self.app.copy_to_clipboard(address)
        self.notify(address[:500], title="Link copied", markup=False)


def _segments(content: Content, base: Style) -> list[Segment]:
    return [Segment(text, style.rich_style) for text, style in content.render(base, end="") if text]


def _highlight(code: str, language: str, look: type[HighlightTheme]) -> Content:
    try:
        content = highlight(code, language=language, theme=look)
    except Exception:
        # What a lexer cannot read is shown without colours; an answer must not wait for ever for them.
        return Content(code)
    # Lexers may add or take a line end; the spans hold for what both have.
    return content if content.plain == code else Content(code, list(content.spans))


def _language(token: Token) -> str:
    return token.info.split(maxsplit=1)[0].lower() if token.info.strip() else ""


def _code(token: Token) -> str:
    return token.content.rstrip("\n").expandtabs(TAB)


def _offset(text: str, line: int) -> int:
    """Return where a line begins."""
    at = 0
    for _ in range(line):
        at = text.index("\n", at) + 1
    return at
