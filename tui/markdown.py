"""Markdown as models write it, parsed so that no text is lost and no document is dear to show."""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

PARTS_MAX = 400
"""Cells, items and paragraphs of one table or list that is drawn as such. Each is a widget or several, all made anew
whenever a streamed block grows; a larger block is shown as it was written."""

_MATH = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}


def parser() -> Parser:
    """A parser for CommonMark with tables and strikethrough, where HTML is text and LaTeX between its marks is kept."""
    markdown = Parser("commonmark", {"html": False})
    markdown.enable(["table", "strikethrough"])
    markdown.inline.ruler.before("escape", "math", _math)
    return markdown


class Parser(MarkdownIt):
    """A parser that leaves a block which would be too dear to lay out as it was written."""

    def parse(self, src: str, env: dict | None = None) -> list[Token]:  # type: ignore[override]
        """Parse a document, or the tail of one that is still being written."""
        return _plain_large_blocks(super().parse(src, env), src)


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
        for number, line in enumerate(state.src[state.pos : end + 2].split("\n")):
            if number:
                state.push("hardbreak", "br", 0)
            state.push("text", "", 0).content = line
    state.pos = end + 2
    return True


def _plain_large_blocks(tokens: list[Token], source: str) -> list[Token]:
    shown: list[Token] = []
    begin = parts = 0
    for token in tokens:
        shown.append(token)
        if token.level == 0 and token.nesting == 1:
            begin, parts = len(shown) - 1, 0
        elif token.nesting == 1:
            parts += 1
        elif token.level == 0 and token.nesting == -1 and parts > PARTS_MAX:
            first, last = shown[begin].map or [0, 0]
            fence = Token("fence", "code", 0, map=[first, last], info="text", block=True)
            fence.content = "\n".join(source.split("\n")[first:last])
            shown[begin:] = [fence]
    return shown
