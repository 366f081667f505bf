"""The Markdown of one answer, drawn while it is written."""

from __future__ import annotations

from textual.content import Content
from textual.widgets import Markdown
from textual.widgets.markdown import MarkdownFence

from edger1.tui.clean import clean
from edger1.tui.markdown import parser

HIGHLIGHT_MAX = 20_000
"""Characters of a code block that are coloured: each update of a streamed block colours all of it again."""


class _Fence(MarkdownFence):
    """A code block that leaves large code plain."""

    @classmethod
    def highlight(cls, code: str, language: str, ansi: bool = False, dark: bool = False) -> Content:
        if len(code) > HIGHLIGHT_MAX:
            return Content(code)
        # Textual would guess a language that is not named.
        return super().highlight(code, language or "text", ansi, dark)


class AnswerText(Markdown):
    """Markdown from a model: nothing in it is executed, and a link only tells its address."""

    BLOCKS = {**Markdown.BLOCKS, "fence": _Fence, "code_block": _Fence}  # noqa: RUF012

    DEFAULT_CSS = """
    AnswerText {
        padding: 0;
        MarkdownH1 { content-align: left middle; text-style: bold; margin: 1 0; color: $primary; }
        MarkdownH2 { text-style: bold; margin: 1 0; color: $primary; }
        MarkdownH3, MarkdownH4, MarkdownH5, MarkdownH6 { text-style: bold; margin: 1 0; color: $foreground; }
        & > MarkdownHeader:first-child { margin: 0 0 1 0; }
        MarkdownFence, MarkdownFence:light { background: $surface; margin: 0 0 1 0; color: $foreground; }
        MarkdownFence > Label { padding: 0 2; }
        MarkdownBlockQuote { background: transparent; border-left: outer $secondary 50%; margin: 0 0 1 0; }
        MarkdownBullet { color: $secondary; }
    }
    """

    def __init__(self) -> None:
        super().__init__(parser_factory=parser, open_links=False)

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """Show where a link leads, and leave going there to the user."""
        event.stop()
        address = clean(event.href)
        self.app.copy_to_clipboard(address)
        self.notify(address[:500], title="Link copied", markup=False)
