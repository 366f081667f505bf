"""One answer: its reasoning, its text, what it called, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from textual.app import ComposeResult
from textual.content import Content
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from edger1.tui.clean import clean
from edger1.tui.figures import SEPARATOR
from edger1.tui.figures import fields as figures_of
from edger1.tui.hearing import thought_tokens
from edger1.tui.markdown import code_blocks
from edger1.tui.pacing import Pacer
from edger1.tui.recalled import notes_of, recalled
from edger1.tui.tree import Node
from edger1.tui.votes import LONGEST, tally_of
from edger1.tui.widgets.answer_text import AnswerText
from edger1.tui.widgets.notice import Notice
from edger1.tui.widgets.thinking import Thinking
from edger1.tui.widgets.turn import Turn

REMARKS = {
    "cancelled": "Stopped.",
    "length": "Stopped at the limit of length.",
    "failed": "Broken off by an error.",
    "edited": "Edited by you.",
    None: "Broken off.",
}
"""What is said below an answer that did not end by itself, by `Node.finish`."""


class Answer(Turn):
    """Shows an answer: one that is there, or one that comes.

    An answer whose node has a `finish` is shown whole. Another one is fed: `feed` and `think` are cheap, what they are
    given is drawn a little later. The node is read and never written. `called` are widgets for the node's calls.
    """

    DEFAULT_CSS = """
    Answer {
        padding: 0 2;
        &:focus { background: $surface 60%; }
        & > Notice { margin-bottom: 0; }
    }
    """

    def __init__(
        self,
        node: Node,
        clock: Callable[[], float] = time.monotonic,
        *,
        coming: bool | None = None,
        opened: bool = True,
        called: Iterable[Widget] = (),
    ) -> None:
        super().__init__(node)
        self._clock = clock
        self._opened = opened
        self._called = list(called)
        self._pacer = Pacer(self._show)
        self._writing: AnswerText | None = None
        self._thinking: Thinking | None = None
        self._noted: list[str] = []
        self._finished = not (node.finish is None if coming is None else coming)
        self.text = clean(node.text).lstrip()

    @property
    def coming(self) -> bool:
        """Whether more of it may come."""
        return not self._finished

    @property
    def thought(self) -> str:
        """The reasoning so far."""
        return "" if self._thinking is None else self._thinking.text

    @property
    def thought_s(self) -> float | None:
        """Seconds that the reasoning took; None where there is none, or it goes on."""
        return None if self._thinking is None else self._thinking.took_s

    def compose(self) -> ComposeResult:
        """What is there already, in the order it came."""
        if self.node.thought:
            over = self._finished or bool(self.text)
            self._thinking = Thinking(
                self._clock,
                opened=self._opened,
                text=self.node.thought if over else None,
                took_s=self.node.thought_s,
                tokens=thought_tokens(self.node) if over else 0,
            )
            if not over:
                self._thinking.feed(self.node.thought)
            yield self._thinking
        if self.text:
            yield AnswerText(self.text)
        yield from self._called
        remark = REMARKS.get(self.node.finish, "") if self._finished else ""
        if remark:
            yield Notice.remark(remark)
        if self._finished:
            self._noted = notes_of(self.node)
            yield from map(Notice.remark, self._noted)
        yield self.foot

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draw what is behind the parts: all rows are the same one."""
        strip = Strip.blank(crop.width, self.visual_style.rich_style)
        for each in self.get_line_filters():
            strip = strip.apply_filter(each, self.background_colors[1])
        return [strip] * crop.height

    async def think(self, text: str) -> None:
        """Take a piece of the reasoning."""
        if self._finished or not self.foot.is_attached:
            return
        if self._thinking is None:
            self._thinking = Thinking(self._clock, opened=self._opened)
            await self.mount(self._thinking, before=0)
        self._thinking.feed(text)

    async def feed(self, text: str) -> None:
        """Take a piece of the answer's text."""
        if self._finished or not self.is_attached:
            return
        if self._thinking is not None:
            await self._thinking.finish()
        text = clean(text) if self.text else clean(text).lstrip()
        # The user may have stopped it while the reasoning was folded.
        if text and not self._finished:
            self.text += text
            self._pacer.feed(text)

    async def add(self, widget: Widget) -> None:
        """Show a tool's call or result below what was said."""
        await self._pacer.drain()
        await self._put(widget)

    async def _put(self, *widgets: Widget) -> None:
        """Show something at the end, unless another conversation is shown by now, or is about to be."""
        if self.foot.is_attached:
            await self.mount_all(widgets, before=self.foot)

    async def finish(self, remark: str | None = None) -> None:
        """The answer is over, whole or not; `remark` says so below it, by default as the node's `finish` does.

        May be repeated; the first call counts.
        """
        if self._thinking is not None and self.node.finish:
            self._thinking.count(thought_tokens(self.node))
        if not self._finished:
            self._finished = True
            if self.is_attached:
                await self._end(remark)
        if self.is_attached:
            # Who stops an answer sees it end before the engine has told what became of it.
            new = [each for each in notes_of(self.node) if each not in self._noted]
            self._noted += new
            await self._put(*map(Notice.remark, new))

    async def _end(self, remark: str | None) -> None:
        if self._thinking is not None:
            await self._thinking.finish()
        await self._pacer.drain()
        if self._writing is not None:
            await self._writing.finish()
            self._writing = None
        if remark is None:
            remark = REMARKS.get(self.node.finish, "") if self.node.finish else ""
        if remark:
            await self._put(Notice.remark(remark))
        self.look()

    async def resume(self) -> None:
        """More of a finished answer is going to come: what is fed after this goes on where it ended."""
        self._finished, self._noted = False, []
        if self._thinking is not None and not self.text:
            self._thinking.resume()
        await self.query_children(Notice).remove()
        self.look()

    def toggle_thinking(self) -> bool:
        """Fold or unfold the reasoning; False where there is none."""
        if self._thinking is None:
            return False
        self._thinking.toggle()
        return True

    async def toggle_figures(self) -> None:
        """Show what the answer cost, or hide it again."""
        shown = self.query_children(".-figures")
        if shown:
            await shown.remove()
        elif self.node.figures:
            done = recalled(self.node.figures)
            words = SEPARATOR.join(" ".join(each.long.split()) for each in figures_of(done.figures, done.usage))
            if votes := votes_of(self.node):
                words = SEPARATOR.join([*filter(None, [words]), votes.plain])
            notice = Notice.remark(words or "Nothing was measured.")
            notice.add_class("-figures")
            await self._put(notice)

    def possible(self) -> list[str]:
        """Return what can be done with it."""
        if not self._finished:
            return ["copy"]
        cut = self.node.finish in ("cancelled", "length", "failed", None)
        able = {
            "continue": cut and bool(self.node.text or self.node.thought),
            "copy_code": "```" in self.text or "~~~" in self.text or bool(code_blocks(self.text)),
            "figures": bool(self.node.figures),
        }
        actions = ("edit", "regenerate", "continue", "copy", "copy_code", "branch", "figures")
        return [action for action in actions if able.get(action, True)]

    def written(self) -> str:
        """Return the Markdown of the answer."""
        return self.text

    def votes(self) -> Content | None:
        """Return how the samples voted that this answer is one of."""
        return votes_of(self.node, longest=18)

    def action_fold(self) -> None:
        """Fold or unfold the reasoning."""
        self.toggle_thinking()

    async def _show(self, text: str) -> None:
        if not self.foot.is_attached:
            return
        if self._writing is None:
            found = list(self.query_children(AnswerText))
            if found:
                self._writing = found[-1]
            else:
                self._writing = AnswerText()
                await self.mount(self._writing, before=0 if self._thinking is None else 1)
        self._writing.append(text)


def votes_of(node: Node, longest: int = LONGEST) -> Content | None:
    """Return the votes that a message keeps, with its own in bold; None where there are none."""
    own, tally = tally_of(node, longest)
    parts = [(f"{answer}: {count}", "bold" if answer == own else "") for answer, count in tally]
    return Content.assemble("votes ", *_between(parts)) if parts else None


def _between(parts: list[tuple[str, str]]) -> Iterable[tuple[str, str]]:
    for at, part in enumerate(parts):
        if at:
            yield (SEPARATOR, "")
        yield part
