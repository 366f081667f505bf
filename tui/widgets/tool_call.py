"""One call of a tool in the conversation: what is called with what, how it stands, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.reactive import reactive
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from edger1.tui.clean import clean
from edger1.tui.figures import duration
from edger1.tui.widgets.arguments import argument_lines, reveal, summary
from edger1.tui.widgets.paged import Paged

Stage = Literal["asked", "waiting", "running", "done", "failed", "refused", "stopped"]
SAID = {
    "asked": "was asked for and not run",
    "waiting": "waits for your approval",
    "running": "running",
    "done": "done",
    "failed": "failed",
    "refused": "not allowed",
    "stopped": "stopped",
}
_STYLES = {"waiting": "$warning", "running": "$text-primary", "failed": "$error", "refused": "$warning"}


class CallTitle(Static, can_focus=True):
    """The line that folds and unfolds a call, with the mouse or with Enter."""

    ALLOW_SELECT = False
    BINDINGS = [Binding("enter,space", "fold", "Fold", show=False)]  # noqa: RUF012
    DEFAULT_CSS = """
    CallTitle {
        width: 1fr;
        height: 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        color: $text-muted;
        pointer: pointer;
        &:hover, &:focus { text-style: underline; }
    }
    """

    def on_click(self) -> None:
        """Fold or unfold."""
        self.action_fold()

    def action_fold(self) -> None:
        """Fold or unfold."""
        self.query_ancestor(CallView).toggle()


class CallView(Widget):
    """A call, folded to a line; Enter or a click opens its arguments and its result.

    Everything of it was written by a model or a tool, and is shown as plain text. A clock ticks while the call runs,
    and at no other time.
    """

    DEFAULT_CSS = """
    CallView {
        height: auto;
        margin-bottom: 1;
        & > Vertical {
            height: auto;
            display: none;
            padding-left: 1;
            border-left: solid $secondary 60%;
        }
        &.-open > Vertical { display: block; }
        & .result { margin-top: 1; }
        & .remark { color: $text-muted; }
    }
    """

    folded: reactive[bool] = reactive(True)

    def __init__(
        self,
        name: str,
        arguments: dict[str, Any],
        *,
        origin: str = "",
        stage: Stage = "asked",
        result: str | None = None,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`origin` is the tool's, "mcp:files" or "python:tools.py". A past call is given its stage and result."""
        super().__init__()
        self.call_name = name
        self.arguments = arguments
        self.stage: Stage = stage
        self.result = result
        self._origin = origin
        self._seconds = seconds
        self._clock = clock
        self._began: float | None = None
        self._ticking: Timer | None = None

    def compose(self) -> ComposeResult:
        """The line; what is below it is made when it is first opened."""
        yield CallTitle()
        yield Vertical()

    def on_mount(self) -> None:
        """Show the line."""
        self._retitle()

    async def show(self, stage: Stage, result: str | None = None, seconds: float | None = None) -> None:
        """Follow the call to its next stage; from "done" on with its result and how long it took."""
        self.stage = stage
        if stage == "running":
            self._began = self._clock()
            self._ticking = self._ticking or self.set_interval(1.0, self._retitle)
        elif self._ticking is not None:
            self._ticking.stop()
            self._ticking = None
        if result is not None:
            self.result, self._seconds = result, seconds
            if not self.folded:
                await self._fill()
        self._retitle()

    def toggle(self) -> None:
        """Fold or unfold."""
        self.folded = not self.folded

    async def watch_folded(self, folded: bool) -> None:
        """Follow the fold."""
        if not self.is_mounted:
            return
        if not folded:
            await self._fill()
        self.set_class(not folded, "-open")
        self._retitle()

    async def _fill(self) -> None:
        """Build the body anew."""
        body = self.query_one(Vertical)
        await body.remove_children()
        parts: list[Widget] = [Paged(argument_lines(self.arguments), "arguments", page=12)]
        if self.result is not None:
            # A terminal would act on what a tool says; what it hides is of no matter here, unlike in the arguments.
            lines = [Content(line) for line in clean(self.result).expandtabs(4).split("\n")]
            parts.append(Paged(lines, "result"))
        if self._origin:
            parts.append(Static(reveal(f"from {self._origin}"), markup=False, classes="remark"))
        await body.mount_all(parts)

    def _retitle(self) -> None:
        if not self.is_mounted:
            return
        mark = "▸" if self.folded else "▾"
        state = SAID[self.stage]
        if self.stage == "running" and self._began is not None:
            state = f"{state} {duration(self._clock() - self._began)}"
        elif self._seconds is not None and self.stage in ("done", "failed"):
            state = f"{state} in {duration(self._seconds)}"
        parts: list[Any] = [f"{mark} ", reveal(self.call_name).stylize("bold $foreground"), " · "]
        parts.append((state, _STYLES[self.stage]) if self.stage in _STYLES else state)
        if self.folded and self.arguments:
            parts += [" · ", summary(self.arguments)]
        self.query_one(CallTitle).update(Content.assemble(*parts))
