"""Markdown as models write it, parsed so that no text is lost and no document is dear to show."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

CELLS_MAX = 300
"""Cells of a table that is drawn as a table. Each cell is a widget, and a larger table is shown as it was written."""

PARAGRAPH_MAX = 8_000
"""Characters of one paragraph that are looked at for emphasis, links and code; a longer one is shown plain."""

_MATH = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}


def parser() -> Parser:
    """A parser for CommonMark with tables and strikethrough, where HTML is text and LaTeX between its marks is kept."""
    markdown = Parser("commonmark", {"html": False})
    markdown.enable(["table", "strikethrough"])
    markdown.inline.ruler.before("escape", "math", _math)
    return markdown


class Parser(MarkdownIt):
    """A parser that shows what would be too dear to lay out as it was written."""

    def parse(self, src: str, env: dict | None = None) -> list[Token]:  # type: ignore[override]
        """Parse a document, or the tail of one that is still being written."""
        return _plain_large_tables(super().parse(src, env), src)


def _math(state: StateInline, silent: bool) -> bool:
    """Inline rule: LaTeX is passed through with its marks; Markdown would eat its backslashes and underscores."""
    opening = state.src[state.pos : state.pos + 2]
    closing = _MATH.get(opening)
    if closing is None:
        return False
    end = state.src.find(closing, state.pos + 2, state.posMax)
    if end < 0:
        return False
    if not silent:
        state.push("text", "", 0).content = state.src[state.pos : end + 2]
    state.pos = end + 2
    return True


def _plain_large_tables(tokens: list[Token], source: str) -> list[Token]:
    shown: list[Token] = []
    begin = cells = 0
    for token in tokens:
        shown.append(token)
        if token.type == "table_open":
            begin, cells = len(shown) - 1, 0
        elif token.type in ("th_open", "td_open"):
            cells += 1
        elif token.type == "table_close" and cells > CELLS_MAX:
            opened = shown[begin]
            fence = Token("fence", "code", 0, map=opened.map, level=opened.level, block=True)
            first, last = opened.map or [0, 0]
            fence.content = "\n".join(source.split("\n")[first:last])
            shown[begin:] = [fence]
    return shown
