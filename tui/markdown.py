"""Markdown as models write it, parsed so that no text is lost and no document is dear to show.

What is shown is bounded by time, not by trust: a block that would be dear to parse or to lay out is shown as it was
written, in a token of type "plain". Reference definitions are off: they vanish from what is shown, a page of them costs
quadratic time, and a link whose address stands elsewhere cannot be told from one that lies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from edger1.tui.clean import tame

PARTS_MAX = 200
"""Cells, items and paragraphs of one table or list that is drawn as such. All of it is laid out anew whenever it grows
while it is streamed; a larger one is shown as it was written."""
BLOCKS_MAX = 1_000
"""Blocks of one document that are drawn as such; what comes after them is shown as it was written."""
INLINE_MAX = 8_000
"""Characters of one paragraph whose emphasis, links and code are looked for."""
MARKS_MAX = 1_000
"""Characters of one paragraph that may begin emphasis, links or code: pairing them costs quadratic time."""
DEPTH_MAX = 12
"""Levels of quotes, lists and items within one another, or of emphasis: each makes the layout of all below dearer."""
LINE_MAX = 8_000
"""Characters of a line that the parser sees; the block it stands in is shown as it was written."""
CODE_MAX = 20_000
"""Characters of a code block that are coloured: each update of a streamed block colours all of it again."""
PLAIN = "plain"

_MATH = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
_MARKS = re.compile(r"[*_`~\[\]!<&\\$]")


def parser() -> Parser:
    """A parser for CommonMark with tables and strikethrough, where HTML is text and LaTeX between its marks is kept."""
    markdown = Parser("commonmark", {"html": False})
    markdown.enable(["table", "strikethrough"])
    markdown.disable("reference")
    markdown.inline.ruler.before("escape", "math", _math)
    markdown.core.ruler.before("inline", "bounds", _bounds)
    markdown.core.ruler.after("inline", "nesting", _nesting)
    return markdown


class Parser(MarkdownIt):
    """A parser that leaves a block which would be too dear to lay out as it was written."""

    def parse(self, src: str, env: dict | None = None) -> list[Token]:  # type: ignore[override]
        """Parse a document, or the tail of one that is still being written."""
        lines = tame(src).split("\n")
        # How a line begins decides what block it belongs to; the rest of a long one is put back by `_bounds`.
        short = "\n".join(line if len(line) <= LINE_MAX else line[:LINE_MAX] for line in lines)
        return super().parse(short, {"lines": lines, **(env or {})})


def _blocks_only() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table").disable("reference")
    markdown.core.ruler.enableOnly(["normalize", "block"])
    return markdown


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


def _bounds(state: StateCore) -> None:
    """Core rule, before text is looked into: blocks that are too dear become plain ones."""
    lines: list[str] = state.env["lines"]
    shown: list[Token] = []
    blocks: int = state.env.get("blocks", 0)
    for block in top_blocks(state.tokens):
        first, last = block[0].map or [0, 0]
        blocks += weight(block)
        if blocks > BLOCKS_MAX:
            shown.append(_plain(lines[first:], first, len(lines)))
            break
        if _too_dear(block, lines[first:last]):
            code = block[0].type == "fence"
            closed = code and last - first > 1 and lines[last - 1].strip().startswith(block[0].markup)
            inner = lines[first + 1 : last - closed] if code else lines[first:last]
            shown.append(_plain(inner, first, last))
        else:
            shown += block
    state.tokens = shown


def _nesting(state: StateCore) -> None:
    """Core rule, after text was looked into: where emphasis is nested without sense, the text is as it was written."""
    for token in state.tokens:
        if token.children and max(child.level for child in token.children) > DEPTH_MAX:
            text = Token("text", "", 0)
            text.content = token.content
            token.children = [text]


def weight(block: Sequence[Token]) -> int:
    """Return how many of `BLOCKS_MAX` a block counts for."""
    return 1 + sum(token.nesting == 1 for token in block[1:]) // 3


def top_blocks(tokens: Sequence[Token]) -> list[list[Token]]:
    """Divide a document's tokens into its outermost blocks."""
    blocks: list[list[Token]] = []
    depth = 0
    for token in tokens:
        if depth == 0:
            blocks.append([])
        blocks[-1].append(token)
        depth += token.nesting
    return blocks


def _too_dear(block: list[Token], lines: list[str]) -> bool:
    if max(token.level for token in block) > DEPTH_MAX or sum(t.nesting == 1 for t in block[1:]) > PARTS_MAX:
        return True
    if any(len(line) > LINE_MAX for line in lines):
        return True
    for token in block:
        if token.type in ("fence", "code_block") and len(token.content) > CODE_MAX:
            return True
        if token.type == "inline":
            if len(token.content) > INLINE_MAX:
                return True
            if len(token.content) > MARKS_MAX and len(_MARKS.findall(token.content)) > MARKS_MAX:
                return True
    return False


def _plain(lines: list[str], first: int, last: int) -> Token:
    token = Token(PLAIN, "", 0, map=[first, last], block=True)
    token.content = "\n".join(lines).rstrip("\n")
    return token


@dataclass(frozen=True)
class Code:
    """A code block of a message: the language as its fence names it, and the text."""

    language: str
    text: str


def code_blocks(text: str) -> list[Code]:
    """Return the code blocks of a Markdown text in their order, as they were written and however large."""
    return [
        Code(token.info.split(maxsplit=1)[0] if token.info.strip() else "", token.content.rstrip("\n"))
        for token in _blocks_only().parse(text)
        if token.type in ("fence", "code_block")
    ]
