"""Markdown's blocks as lines of text, for a widget that draws lines.

A line is wrapped by whoever draws it. What stands before it (the bullet of a list, the bar of a quote, the margin of
code) is apart from its text, so that rows that wrapping makes stand below the text and not below the bullet.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from markdown_it.token import Token
from rich.cells import cell_len
from textual.content import Content, Span
from textual.style import Style

from edger1.tui.clean import clean
from edger1.tui.markdown import PLAIN
from edger1.tui.widgets.plain_text import TAB, rows_of

BULLETS = "•▪‣◦"
BAR = "▌ "
LANGUAGE_MAX = 20
CELL_MIN = 4
"""Columns that a cell of a table keeps, however narrow the screen."""
_NOTHING = Content("")
_MARKED = {"em_open": "italic", "strong_open": "bold", "s_open": "strike"}
_HEADINGS = {"h1": "bold $primary", "h2": "bold $primary"}
_GROUND = "on $surface"


@dataclass(frozen=True)
class Line:
    """One line: its text, what stands before its first row and before the others, and the ground of the whole row."""

    text: Content
    first: Content = _NOTHING
    rest: Content = _NOTHING
    ground: str = ""
    mark: str = ""
    """What belongs to the text though it stands before it: a bullet, a number."""
    said: bool = True
    """Whether it is part of what was said, and can be selected."""
    code: str | None = None
    """All the code below, where this line is the title of a code block."""


@dataclass
class _Within:
    """A quote, list or item that is being laid out."""

    first: Content
    rest: Content
    mark: str = ""
    begun: bool = False
    number: int = 0
    loose: bool = False


@dataclass
class Drawing:
    """Lays the tokens of whole blocks out as lines for a width; `coloured` gives the code of a block its colours."""

    width: int
    coloured: Callable[[Token, str], Content]
    lines: list[Line] = field(default_factory=list)
    _within: list[_Within] = field(default_factory=list)

    def add(self, blocks: Sequence[Sequence[Token]]) -> None:
        """Lay out some more blocks."""
        for tokens in blocks:
            self._gap = bool(self.lines)
            self._block(tokens)
            self._within.clear()

    def _block(self, tokens: Sequence[Token]) -> None:
        at = 0
        while at < len(tokens):
            token = tokens[at]
            kind = token.type
            if kind == "table_open":
                end = next(i for i in range(at, len(tokens)) if tokens[i].type == "table_close")
                self._table(tokens[at:end])
                at = end
            elif kind in ("bullet_list_open", "ordered_list_open"):
                self._within.append(_Within(_NOTHING, _NOTHING, loose=_loose(tokens, at)))
            elif kind == "list_item_open":
                self._item(token)
            elif kind == "blockquote_open":
                bar = Content.styled(BAR, "$secondary 50%")
                self._within.append(_Within(bar, bar))
            elif kind in ("bullet_list_close", "ordered_list_close", "list_item_close", "blockquote_close"):
                self._leave(kind)
            elif kind == "inline":
                self._words(token, tokens[at - 1])
            elif kind in ("fence", "code_block"):
                self._code(token)
            elif kind == PLAIN:
                for line in token.content.split("\n"):
                    self._put(Content(line.expandtabs(TAB)))
                self._gap = True
            elif kind == "hr":
                room = self.width - len(self._before()[1])
                self._put(Content.styled("─" * max(room, 1), "$secondary"), said=False)
                self._gap = True
            at += 1

    def _item(self, token: Token) -> None:
        outer = self._within[-1]
        if outer.number and outer.loose:
            self._gap = True
        depth = sum(each.mark != "" for each in self._within)
        mark = f"{token.info}. " if token.info else f"{BULLETS[depth % len(BULLETS)]} "
        outer.number += 1
        self._within.append(_Within(Content.styled(mark, "$secondary"), Content(" " * len(mark)), mark))

    def _leave(self, kind: str) -> None:
        left = self._within.pop()
        if kind == "list_item_close" and not left.begun:
            self._within.append(left)
            self._put(_NOTHING)
            self._within.pop()
        if kind != "list_item_close" and not any(each.mark for each in self._within):
            self._gap = True

    def _words(self, token: Token, opening: Token) -> None:
        style = _HEADINGS.get(opening.tag, "bold") if opening.type == "heading_open" else ""
        for line in inline(token).split("\n", allow_blank=True):
            self._put(line.stylize_before(style) if style else line)
        if not opening.hidden:
            self._gap = True

    def _code(self, token: Token) -> None:
        code = token.content.rstrip("\n")
        name = clean(token.info.split(maxsplit=1)[0])[:LANGUAGE_MAX] if token.info.strip() else ""
        room = self.width - len(self._before()[1]) - 4
        title = Content.assemble(
            (name, "$text-muted"), " " * max(1, room - cell_len(name) - len("copy")), ("copy", "$text-primary")
        )
        self._put(title, "  ", ground=_GROUND, said=False, code=code)
        for line in self.coloured(token, code.expandtabs(TAB)).split("\n", allow_blank=True):
            self._put(line, "  ", ground=_GROUND)
        self._gap = True

    def _table(self, tokens: Sequence[Token]) -> None:
        rows: list[list[Content]] = []
        for token in tokens:
            if token.type == "tr_open":
                rows.append([])
            elif token.type == "inline":
                rows[-1].append(Content(" ").join(inline(token).split("\n")))
        count = max(map(len, rows), default=0)
        room = self.width - len(self._before()[1]) - 3 * max(count - 1, 0)
        wanted = [max([cell_len(row[at].plain) for row in rows if at < len(row)] + [1]) for at in range(count)]
        widths = share(wanted, room)
        between = Content.styled(" │ ", "$foreground 20%")
        for number, row in enumerate(rows):
            cells = [cut(cell, width) for cell, width in zip(row, widths, strict=False)]
            for at in range(max(map(len, cells), default=0)):
                parts = [
                    padded(cell[at] if at < len(cell) else _NOTHING, w) for cell, w in zip(cells, widths, strict=False)
                ]
                line = between.join(parts)
                self._put(line.stylize_before("bold $primary") if number == 0 else line)
            if number == 0:
                self._put(Content.styled("─┼─".join("─" * w for w in widths), "$foreground 20%"), said=False)
        self._gap = True

    def _before(self) -> tuple[Content, Content]:
        """What stands before the next line's first row, and its others, here."""
        first = Content("").join([each.rest if each.begun else each.first for each in self._within])
        rest = Content("").join([each.rest for each in self._within])
        most = max(self.width // 2, 1)
        return first[:most], rest[:most]

    def _put(self, text: Content, margin: str = "", **given: object) -> None:
        if self._gap and self.lines:
            outer = [each.rest for each in self._within if each.begun]
            self.lines.append(Line(_NOTHING, Content("").join(outer)[: max(self.width // 2, 1)], said=False))
        self._gap = False
        first, rest = self._before()
        mark = "".join(each.mark for each in self._within if not each.begun)
        for each in self._within:
            each.begun = True
        self.lines.append(Line(text, first + margin, rest + margin, mark=mark, **given))  # type: ignore[arg-type]

    _gap = False


def _loose(tokens: Sequence[Token], at: int) -> bool:
    level = tokens[at].level
    for token in tokens[at + 1 :]:
        if token.level <= level:
            break
        if token.type == "paragraph_open" and token.level == level + 2 and not token.hidden:
            return True
    return False


def share(wanted: Sequence[int], room: int) -> list[int]:
    """Divide `room` columns: who wants less than an equal share gets it, the others divide the rest."""
    widths = list(wanted)
    left, open_ = room, sorted(range(len(wanted)), key=lambda at: wanted[at])
    while open_:
        fair = max(left // len(open_), CELL_MIN)
        at = open_.pop(0)
        widths[at] = min(wanted[at], fair)
        left -= widths[at]
    return widths


def cut(text: Content, width: int) -> list[Content]:
    """Wrap a line."""
    return [text[begin:end] for _, begin, end in rows_of(text.plain, 0, 0, width)]


def padded(text: Content, width: int) -> Content:
    """Fill up to a width."""
    return text + " " * max(0, width - cell_len(text.plain))


def inline(token: Token) -> Content:
    """The text of a paragraph, with its emphasis, its code, and its links as something to be clicked."""
    parts: list[str] = []
    spans: list[Span] = []
    opened: list[tuple[str | Style, int]] = []
    at = 0
    for text, style in _runs(token.children or ()):
        if style is not None and not text:
            opened.append((style, at))
        elif text is None:
            if opened:
                look, begin = opened.pop()
                spans.append(Span(begin, at, look))
        else:
            parts.append(text)
            if style is not None:
                spans.append(Span(at, at + len(text), style))
            at += len(text)
    return Content("".join(parts), spans)


def _runs(children: Sequence[Token]) -> Iterator[tuple[str | None, str | Style | None]]:
    """Text with its style; ("", style) opens one, (None, None) closes the last."""
    for child in children:
        if child.type == "text":
            if child.content:
                yield re.sub(r"\s+", " ", child.content), None
        elif child.type == "hardbreak":
            yield "\n", None
        elif child.type == "softbreak":
            yield " ", None
        elif child.type == "code_inline":
            yield child.content, "$text-warning on $warning 10%"
        elif child.type in _MARKED:
            yield "", _MARKED[child.type]
        elif child.type == "link_open":
            yield "", _link(str(child.attrs.get("href", "")))
        elif child.type == "image":
            words = "".join(each.content for each in child.children or ())
            yield f"🖼  {words or child.content}", _link(str(child.attrs.get("src", "")))
        elif child.type.endswith("_close"):
            yield None, None
        elif child.content:
            yield child.content, None


def _link(address: str) -> Style:
    return Style(underline=True) + Style.from_meta({"@click": f"link({address!r})"})
