"""One answer: its reasoning, its text, and how it ended."""

from __future__ import annotations

from collections.abc import Callable

from textual.containers import Vertical
from textual.widgets.markdown import Markdown, MarkdownStream

from edger1.tui.clean import clean
from edger1.tui.pacing import Pacer
from edger1.tui.widgets.answer_text import AnswerText
from edger1.tui.widgets.notice import Notice
from edger1.tui.widgets.thinking import Thinking

BLOCKS_MAX = 500
"""Blocks of an answer that is drawn once more in full when it ends; a longer one would hold the screen up."""


class Answer(Vertical):
    """Shows an answer while it comes. `feed` and `think` are cheap; what they are given is drawn a little later."""

    DEFAULT_CSS = """
    Answer {
        height: auto;
        padding: 0 2;
    }
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self._clock = clock
        self._pacer = Pacer(self._show)
        self._stream: MarkdownStream | None = None
        self._thinking: Thinking | None = None
        self._finished = False
        self.text = ""

    async def think(self, text: str) -> None:
        """Take a piece of the reasoning."""
        if self._finished:
            return
        if self._thinking is None:
            self._thinking = Thinking(self._clock)
            await self.mount(self._thinking)
        self._thinking.feed(text)

    async def feed(self, text: str) -> None:
        """Take a piece of the answer's text."""
        if self._finished:
            return
        if self._thinking is not None:
            await self._thinking.finish()
        text = clean(text) if self.text else clean(text).lstrip()
        # The user may have stopped it while the reasoning was folded.
        if text and not self._finished:
            self.text += text
            self._pacer.feed(text)

    async def finish(self, remark: str = "") -> None:
        """The answer is over, whole or not; `remark` says so below it. May be repeated; the first call counts."""
        if self._finished:
            return
        self._finished = True
        if self._thinking is not None:
            await self._thinking.finish()
        await self._pacer.drain()
        if self._stream is not None:
            await self._stream.stop()
            # Streaming adds block to block; what a later line changes in an earlier block shows only in a full render.
            if len(self._stream.markdown_widget.children) <= BLOCKS_MAX:
                await self._stream.markdown_widget.update(self.text)
        if remark:
            await self.mount(Notice.remark(remark))

    def toggle_thinking(self) -> bool:
        """Fold or unfold the reasoning; False where there is none."""
        if self._thinking is None:
            return False
        self._thinking.toggle()
        return True

    async def _show(self, text: str) -> None:
        if self._stream is None:
            markdown = AnswerText()
            await self.mount(markdown)
            self._stream = Markdown.get_stream(markdown)
        await self._stream.write(text)
