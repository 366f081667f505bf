"""The conversation on the screen.

Only the messages near what is seen are mounted; a `Spacer` above and one below are as high as the others, measured or
guessed. What is seen stays where it is whatever is mounted, unmounted or unfolded above it: the message at the top is
pinned, and the scroll position follows it in the layout itself, before anything is painted.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from textual import events, on
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.layout import DockArrangeResult
from textual.message import Message
from textual.reactive import Reactive
from textual.scrollbar import ScrollBar
from textual.widget import Widget

from edger1.tui.tree import Node, Tree
from edger1.tui.widgets.copying import Copying, as_markdown
from edger1.tui.widgets.entry import Entry, results_of, shown, span
from edger1.tui.widgets.question import Question
from edger1.tui.widgets.spacer import Spacer
from edger1.tui.widgets.turn import Turn

if TYPE_CHECKING:
    from edger1.tui.widgets.answer import Answer

MARGIN = 1.5
"""Screens that are mounted above and below what is seen."""
FAR = 4.0
"""Screens from what is seen at which messages are unmounted."""
LAID_OUT_S = 5.0
"""Seconds to wait for the screen to give what was mounted its place; it may be about to close."""

Called = Callable[[Node, Sequence[Node]], Iterable[Widget]]
"""Makes the widgets for an answer's calls, given its node and the tools' messages that follow it."""


class Transcript(VerticalScroll, Copying, can_focus=False):
    """Everything said so far, scrolled to the end until the user scrolls up."""

    DEFAULT_CSS = """
    Transcript {
        height: 1fr;
        padding: 1 0 0 0;
        scrollbar-gutter: stable;
        align: left bottom;
        scrollbar-size-vertical: 1;
        scrollbar-color: $secondary 40%;
        scrollbar-background: $background;
        .-short & { padding-top: 0; }
    }
    """
    # Its scroll bar, where one comes or goes, asks for the layout that this would ask for each time.
    virtual_size: Reactive[Size] = Reactive(Size(0, 0), layout=False)

    class Act(Message):
        """The user wants something done to a message.

        `action` is "edit" (with the new `text`), "regenerate", "continue", "branch", "previous" or "next". Copying and
        showing figures happen here.
        """

        def __init__(self, node_id: str, action: str, text: str | None = None) -> None:
            super().__init__()
            self.node_id = node_id
            self.action = action
            self.text = text

    class Left(Message):
        """The keyboard is wanted elsewhere: in the text box."""

    def __init__(
        self,
        *children: Widget,
        clock: Callable[[], float] = time.monotonic,
        opened: bool = True,
        called: Called | None = None,
    ) -> None:
        super().__init__(*children)
        self.opened = opened
        """Whether reasoning is open while it comes."""
        self._clock = clock
        self._called = called
        self._tree: Tree | None = None
        self._entries: list[Entry] = []
        self._first = 0
        self._last = 0
        self._above = Spacer()
        self._below = Spacer()
        self._pin: tuple[Widget, int] | None = None
        self._placed: dict[Widget, tuple[int, int]] = {}
        self._one_at_a_time = asyncio.Lock()
        self._keeping: asyncio.Task[None] | None = None

    # What is shown

    async def open(self, tree: Tree, at: str | None = None) -> None:
        """Show a conversation from its end, or with the message `at` in view."""
        await self.clear(tree)
        if at is None or not await self.show(at):
            await self._go_to_end()

    async def clear(self, tree: Tree | None = None) -> None:
        """Show nothing, with the conversation `tree` to be shown next."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        async with self._one_at_a_time:
            self._entries, self._first, self._last = [], 0, 0
            self._pin, self._placed = None, {}
            await self.remove_children()
            self._above, self._below = Spacer(), Spacer()
            if tree is not None:
                self._tree = tree
                self._entries = [Entry(node) for node in shown(tree)]

    async def say(self, *widgets: Widget) -> None:
        """Add to the end, and go there."""
        async with self._one_at_a_time:
            at_end = self._last == len(self._entries)
            for widget in widgets:
                self._entries.append(Entry(widget.node if isinstance(widget, Turn) else None, widget))
            await self.mount_all(widgets)
            if at_end:
                self._last = len(self._entries)
            self._number()
        if at_end:
            self.anchor()
            self._keep_soon()
        else:
            await self._go_to_end()

    async def follow(self, tree: Tree | None = None) -> None:
        """Show the branch that the tree shows; what both branches share is left as it is."""
        self._tree = tree or self._tree
        if self._tree is None:
            return
        path = shown(self._tree)
        async with self._one_at_a_time:
            old = [entry for entry in self._entries if entry.node is not None]
            same = 0
            while same < min(len(old), len(path)) and old[same].node is path[same]:
                same += 1
            if same == len(old) == len(path):
                self._number()
                return
            begin = self._entries.index(old[same]) if same < len(old) else len(self._entries)
            changed = self._entries[begin:]
            mounted = [entry.widget for entry in changed if entry.widget is not None]
            top = next((self._placed[w][0] for w in mounted if w in self._placed), None)
            self._entries[begin:] = [Entry(node) for node in path[same:]]
            self._first, self._last = min(self._first, begin), min(self._last, begin)
            offset = 0 if top is None else max(0, top - self.scroll_offset.y)
            with self.app.batch_update():
                await self.remove_children(mounted)
                await self._show_window(self._first, self._last)
        if begin < len(self._entries) and offset < self.size.height:
            await self._jump(begin, offset)
        else:
            await self._go_to_end()

    def answer(self, node_id: str) -> Answer | None:
        """Return the widget of an answer, where it is mounted; one that comes always is."""
        from edger1.tui.widgets.answer import Answer

        at = self._index(node_id)
        widget = None if at is None else self._entries[at].widget
        return widget if isinstance(widget, Answer) else None

    async def drop(self, widget: Widget) -> None:
        """Take back what was said."""
        async with self._one_at_a_time:
            at = next((i for i, entry in enumerate(self._entries) if entry.widget is widget), None)
            if at is not None:
                del self._entries[at]
                self._first -= at < self._first
                self._last -= at < self._last
            if widget.is_attached:
                await widget.remove()

    async def show(self, node_id: str, focus: bool = False) -> bool:
        """Bring a message into view, as search does; False where the shown branch does not have it."""
        at = self._index(node_id)
        if at is None:
            return False
        entry = self._entries[at]
        await self._jump(at, min(2, self.size.height // 4))
        widget = entry.widget
        if focus and widget is not None:
            widget.focus(scroll_visible=False)
        return True

    async def show_first(self) -> None:
        """Go to the very start."""
        if self._entries:
            await self._jump(0, 0)
            self.scroll_to(y=0, animate=False, immediate=True)

    async def show_last(self) -> None:
        """Go to the end, and stay there while more comes."""
        await self._go_to_end()

    def take_keyboard(self) -> bool:
        """Give the keyboard to the last message that is seen; False where there is none."""
        seen = [entry.widget for entry in self._entries[self._first : self._last] if isinstance(entry.widget, Turn)]
        top = self.scroll_offset.y
        seen = [w for w in seen if w in self._placed and self._placed[w][0] < top + self.size.height] or seen
        if seen:
            seen[-1].focus(scroll_visible=False)
        return bool(seen)

    # What the user does

    @on(Turn.Moved)
    def _move(self, event: Turn.Moved) -> None:
        event.stop()
        if event.pages:
            (self.scroll_page_down if event.pages > 0 else self.scroll_page_up)(animate=False)
            return
        self.run_worker(self._move_keyboard(event.turn, event.step, event.to), group="transcript-keys")

    async def _move_keyboard(self, turn: Turn, step: int, to: str) -> None:
        top, height = self.scroll_offset.y, self.size.height
        begin, end = self._placed.get(turn, (top, top))
        # A message that is higher than the screen is read before the next one has its turn.
        if step > 0 and end > top + height and begin < top + height:
            self.scroll_to(y=min(top + height // 2, end - height), animate=False, immediate=True)
            return
        if step < 0 and begin < top < end:
            self.scroll_to(y=max(top - height // 2, begin), animate=False, immediate=True)
            return
        if to:
            await (self.show_first() if to == "first" else self.show_last())
            nodes = [entry for entry in self._entries if entry.node is not None]
            if not nodes:
                return
            goal = nodes[0 if to == "first" else -1]
        else:
            at = next((i for i, entry in enumerate(self._entries) if entry.widget is turn), None)
            if at is None:
                return
            at += step
            while 0 <= at < len(self._entries) and self._entries[at].node is None:
                at += step
            if at >= len(self._entries):
                self.post_message(self.Left())
                return
            if at < 0:
                self.scroll_to(y=0, animate=False, immediate=True)
                return
            goal = self._entries[at]
            if goal.widget is None:
                await self._jump(at, 0)
        if goal.widget is not None:
            goal.widget.focus(scroll_visible=False)
            await self._laid_out()
            self._reveal(goal.widget, step)

    def _reveal(self, widget: Widget, step: int) -> None:
        top, height = self.scroll_offset.y, self.size.height
        begin, end = self._placed.get(widget, (top, top))
        if end - begin > height:
            y = begin if step > 0 else end - height
        elif begin < top:
            y = begin
        elif end > top + height:
            y = end - height
        else:
            return
        self.scroll_to(y=y, animate=False, immediate=True)

    async def _reveal_soon(self, widget: Widget) -> None:
        await self._laid_out()
        await self._laid_out()
        self._reveal(widget, -1)

    @on(Turn.Left)
    def _leave(self, event: Turn.Left) -> None:
        event.stop()
        self.post_message(self.Left())

    @on(Turn.Asked)
    async def _act(self, event: Turn.Asked) -> None:
        event.stop()
        turn = event.turn
        if event.action == "edit" and event.text is None:
            await turn.begin_edit()
            self.run_worker(self._reveal_soon(turn), group="transcript-edit")
        elif event.action == "copy":
            self.copy(turn.written(), "the message")
        elif event.action == "copy_code":
            self.copy_code(turn)
        elif event.action == "copy_all":
            self.copy_all()
        elif event.action == "figures":
            from edger1.tui.widgets.answer import Answer

            if isinstance(turn, Answer):
                await turn.toggle_figures()
        else:
            self.post_message(self.Act(turn.node.id, event.action, event.text))

    def copy_all(self) -> None:
        """Copy the shown branch as Markdown, without reasoning."""
        parts = as_markdown(entry.node for entry in self._entries if entry.node is not None)
        self.copy("\n".join(parts), f"the conversation, {len(parts)} messages")

    # What is mounted

    def arrange(self, size: Size, optimal: bool = False) -> DockArrangeResult:
        """Lay out, and move the scroll position so that the pinned message stays where it was seen."""
        result = super().arrange(size, optimal)
        if optimal:
            return result
        self._placed = {each.widget: (each.region.y, each.region.bottom) for each in result.placements}
        if self._pin is not None and not (self._anchored and not self._anchor_released):
            widget, offset = self._pin
            if widget in self._placed:
                # The scroll bar's own limits follow only after this layout.
                most = max(0, result.spatial_map.total_region.bottom - size.height)
                y = min(max(0, self._placed[widget][0] - offset), most)
                if y != self.scroll_y and round(self.scroll_y) != y:
                    self.set_reactive(Widget.scroll_y, float(y))
                    self.set_reactive(Widget.scroll_target_y, float(y))
                    self.vertical_scrollbar.set_reactive(ScrollBar.position, y)
        return result

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Pin what is seen, and see to it that there is something to see further on."""
        super().watch_scroll_y(old_value, new_value)
        self._pin_top()
        self._keep_soon()

    def on_resize(self, event: events.Resize) -> None:
        """Another width gives other heights."""
        self._keep_soon()

    def _pin_top(self) -> None:
        top = self.scroll_offset.y
        for entry in self._entries[self._first : self._last]:
            if entry.widget in self._placed and self._placed[entry.widget][1] > top:
                self._pin = (entry.widget, self._placed[entry.widget][0] - top)
                return

    def _index(self, node_id: str) -> int | None:
        return next((i for i, e in enumerate(self._entries) if e.node is not None and e.node.id == node_id), None)

    def _make(self, at: int) -> Widget:
        node = self._entries[at].node
        assert node is not None, "a remark is never unmounted"
        if node.role == "user":
            return Question(node)
        results = results_of(self._tree, node) if node.calls else []
        called = self._called(node, results) if self._called is not None and node.calls else ()
        from edger1.tui.widgets.answer import Answer

        return Answer(node, self._clock, coming=False, opened=self.opened, called=called)

    async def _show_window(self, first: int, last: int) -> None:
        """Mount the entries from `first` up to `last`, unmount the others, and size the spacers. Holds the lock."""
        width = self._width
        outside = [*self._entries[:first], *self._entries[last:]]
        gone = [(each, each.widget) for each in outside if each.widget is not None and not each.kept]
        for entry, widget in gone:
            begin, end = self._placed.get(widget, (0, 0))
            entry.rows = end - begin or entry.rows
        await self.remove_children([widget for _, widget in gone])
        for entry, _ in gone:
            entry.widget = None
        self._first, self._last = first, last
        batch: list[Widget] = []
        for at in range(first, last):
            entry = self._entries[at]
            if entry.widget is None:
                entry.widget = self._make(at)
                batch.append(entry.widget)
            elif batch:
                await self.mount_all(batch, before=entry.widget)
                batch = []
        if batch:
            after = next((e.widget for e in self._entries[last:] if e.widget is not None), None)
            following = self._below if self._below.is_attached else after
            await (self.mount_all(batch) if following is None else self.mount_all(batch, before=following))
        await self._space(width)
        self._number(first, last)

    async def _space(self, width: int) -> None:
        for spacer, entries in (
            (self._above, self._entries[: self._first]),
            (self._below, self._entries[self._last :]),
        ):
            rows = sum(entry.height(width) for entry in entries if entry.widget is None)
            if not rows and not spacer.is_attached:
                continue
            if not spacer.is_attached:
                await self.mount(spacer)
            spacer.styles.height = rows
        mounted = [entry.widget for entry in self._entries[self._first : self._last] if entry.widget is not None]
        if mounted and self._above.is_attached and self.children[0] is not self._above:
            self.move_child(self._above, before=0)
        if mounted and self._below.is_attached:
            self.move_child(self._below, after=mounted[-1])

    def _number(self, first: int | None = None, last: int | None = None) -> None:
        """Tell the mounted messages which alternative they are."""
        if self._tree is None:
            return
        for entry in self._entries[first:last]:
            if isinstance(entry.widget, Turn) and entry.node is not None and entry.node.id in self._tree:
                siblings = self._tree.siblings(entry.node.id)
                entry.widget.show_branch(1 + siblings.index(entry.node), len(siblings))

    @property
    def _width(self) -> int:
        return max(20, self.size.width - 6)

    @property
    def _height(self) -> int:
        return max(5, self.size.height)

    async def _go_to_end(self) -> None:
        async with self._one_at_a_time:
            end = len(self._entries)
            first = span(self._entries, end - 1, -1, self._height, self._width) + 1
            with self.app.batch_update():
                await self._show_window(first, end)
                self.anchor()
        self._keep_soon()

    async def _jump(self, at: int, offset: int) -> None:
        """Mount what is around an entry, which then begins `offset` rows below the top."""
        entry = self._entries[at]
        async with self._one_at_a_time:
            # Another conversation, or another branch, may be shown by now.
            found = next((i for i, each in enumerate(self._entries) if each is entry), None)
            if found is None:
                return
            at = found
            last = span(self._entries, at, 1, self._height - offset, self._width)
            first = span(self._entries, at - 1, -1, offset, self._width) + 1
            if last == len(self._entries):
                first = min(first, span(self._entries, last - 1, -1, self._height, self._width) + 1)
            widgets = [e.widget for e in self._entries[first:last]]
            if self._first <= first and last <= self._last and None not in widgets:
                first, last = self._first, self._last
            with self.app.batch_update():
                self.release_anchor()
                self._anchored = False
                await self._show_window(first, last)
                if entry.widget is not None:
                    self._pin = (entry.widget, offset)
                self.refresh(layout=True)
        await self._laid_out()
        self._keep_soon()

    def _keep_soon(self) -> None:
        if self._entries and self.is_attached and (self._keeping is None or self._keeping.done()):
            self._keeping = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        """Mount and unmount, one message at a time, until enough is there around what is seen, and not much more."""
        await self._laid_out()
        for _ in range(len(self._entries) + 10):
            async with self._one_at_a_time:
                goal = self._goal()
                if goal is None:
                    return
                with self.app.batch_update():
                    await self._show_window(*goal)
            await self._laid_out()

    def _goal(self) -> tuple[int, int] | None:
        """Return the next better window, or None where the present one will do."""
        first, last, end = self._first, self._last, len(self._entries)
        window = [self._placed[e.widget] for e in self._entries[first:last] if e.widget in self._placed]
        if not window:
            return None
        height, view = self._height, self.scroll_offset.y
        top, bottom = window[0][0], window[-1][1]
        if (first > 0 and view + height <= top) or (last < end and view >= bottom):
            return self._window_at(view)
        if first > 0 and view - top < MARGIN * height:
            return first - 1, last
        if last < end and bottom - view - height < MARGIN * height:
            return first, last + 1
        near = [
            i
            for i, (begin, finish) in enumerate(window)
            if finish > view - FAR * height and begin < view + (FAR + 1) * height
        ]
        if near and len(window) == last - first and (near[0] > 0 or near[-1] < len(window) - 1):
            return first + near[0], first + near[-1] + 1
        return None

    def _window_at(self, view: int) -> tuple[int, int]:
        """Return the entries that a place of the scroll bar stands for, when it is in a spacer."""
        width = self._width
        ends = accumulate(entry.height(width) for entry in self._entries)
        at = next((at for at, end in enumerate(ends) if end > view), len(self._entries) - 1)
        self._pin = None
        return at, span(self._entries, at, 1, self._height, self._width)

    async def _laid_out(self) -> None:
        """Wait until what was mounted has its place."""
        done = asyncio.Event()
        # A screen that is going says so, or never calls back.
        if self.call_after_refresh(done.set):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), LAID_OUT_S)
