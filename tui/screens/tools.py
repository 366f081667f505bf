"""The tools of a conversation: whose they are, how their servers do, which are offered, what is always allowed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edger1.tools.kinds import Tool
from edger1.tui.clean import clean
from edger1.tui.screens.over import Over
from edger1.tui.widgets.arguments import reveal
from edger1.tui.widgets.options import Options

if TYPE_CHECKING:
    from edger1.tools.toolbox import ServerView

LOOK_S = 0.5
"""How often to look at servers that are starting; nothing is looked at while none is."""
NOTHING = (
    "There are no tools. config.toml names servers and Python files:\n\n"
    '[tools]\nfunctions = ["tools.py"]\n\n[mcp.files]\ncommand = "a-server"\nargs = ["its", "arguments"]'
)
STATES = {"idle": "not started", "starting": "starting", "ready": "ready", "failed": "failed", "ended": "ended"}
_STYLES = {"ready": "$success", "failed": "$error", "ended": "$warning", "starting": "$text-primary"}


class Box(Protocol):
    """What the screen needs of a `Toolbox`."""

    def servers(self) -> Sequence[ServerView]:
        """Return all servers and files with their tools."""

    def log(self, origin: str) -> str:
        """Return the end of a server's log."""

    async def restart(self, origin: str) -> None:
        """Start a server anew."""


class Allowed(Protocol):
    """What the screen needs of `Approvals`."""

    def allowed(self, tool: Tool) -> str | None:
        """Return how far a tool is allowed."""

    def changed(self, tool: Tool) -> bool:
        """Return whether a tool has changed since it was always allowed."""

    def forget(self, tool: Tool) -> None:
        """Ask about a tool again."""

    def forget_all(self) -> None:
        """Ask about every tool again."""


class ToolsScreen(Over[frozenset[str]]):
    """Lists servers and tools. Its result is what is switched off: origins of servers, keys of tools."""

    BINDINGS = [  # noqa: RUF012
        Binding("escape", "close", "Close"),
        Binding("space", "switch", "On/off"),
        Binding("l", "log", "Log"),
        Binding("r", "restart", "(Re)start"),
        Binding("f", "forget", "Forget"),
        Binding("F", "forget_all", "Forget all", show=False),
    ]
    DEFAULT_CSS = """
    ToolsScreen {
        align: center middle;
        & > Vertical {
            width: 100;
            max-width: 100%;
            height: 90%;
            padding: 0 1;
            border: round $primary;
            background: $surface;
        }
        &.-short > Vertical { height: 100%; }
        & OptionList { height: 1fr; border: none; padding: 0; background: $surface; scrollbar-size-vertical: 1; }
        & OptionList:focus { border: none; background-tint: transparent; }
        & OptionList > .option-list--option-highlighted, & OptionList:focus > .option-list--option-highlighted {
            background: $primary 25%; color: $foreground; text-style: bold underline;
        }
        & OptionList > .option-list--option { padding: 0; }
        & VerticalScroll {
            height: 40%;
            min-height: 3;
            border-top: solid $secondary 50%;
            scrollbar-size-vertical: 1;
        }
        & .hint { color: $text-muted; height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    }
    """

    def __init__(self, box: Box, off: Iterable[str] = (), approvals: Allowed | None = None) -> None:
        """`off` is what is switched off in this conversation already."""
        super().__init__()
        self._box = box
        self._off = set(off)
        self._approvals = approvals
        self._views: dict[str, ServerView] = {}
        self._tools: dict[str, Tool] = {}
        self._log_shown = False
        self._looking = False

    def compose(self) -> ComposeResult:
        """The list above, what there is to say of the marked line below."""
        with Vertical() as box:
            box.border_title = "Tools"
            yield Options(markup=False)
            with VerticalScroll():
                yield Static(markup=False, id="about")
            yield Static(
                "Space on/off · R restart · L log · F forget approval · Esc close", markup=False, classes="hint"
            )

    def on_mount(self) -> None:
        """Fill the list."""
        self.refresh_list()
        self.query_one(OptionList).focus()

    def refresh_list(self) -> None:
        """Show how things are now, and look again soon while a server is starting."""
        options = self.query_one(OptionList)
        at = options.highlighted
        self._views = {view.origin: view for view in self._box.servers()}
        self._tools = {tool.key: tool for view in self._views.values() for tool in view.tools}
        options.clear_options()
        # Options are found by their place: a tool's key is whatever its server likes, and may come twice.
        self._rows: list[ServerView | Tool] = []
        for view in self._views.values():
            self._rows.append(view)
            options.add_option(Option(self._server_line(view)))
            for tool in view.tools:
                self._rows.append(tool)
                options.add_option(Option(self._tool_line(tool)))
        if self._rows:
            options.highlighted = min(at or 0, len(self._rows) - 1)
        self._describe()
        if not self._looking and any(view.state == "starting" for view in self._views.values()):
            self._looking = True
            self.set_timer(LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = False
        self.refresh_list()

    @property
    def _row(self) -> ServerView | Tool | None:
        at = self.query_one(OptionList).highlighted
        return self._rows[at] if at is not None and at < len(self._rows) else None

    def _server_line(self, view: ServerView) -> Content:
        box = "[ ] " if view.origin in self._off else "[x] "
        count = f" · {len(view.tools)} tools" if len(view.tools) != 1 else " · 1 tool"
        state = (STATES[view.state], _STYLES.get(view.state, "$secondary"))
        return Content.assemble(
            box, reveal(view.name).stylize("bold"), "  ", state, (count if view.tools else "", "$secondary")
        )

    def _tool_line(self, tool: Tool) -> Content:
        on = tool.key not in self._off and tool.origin not in self._off
        parts = ["    [x] " if on else "    [ ] ", reveal(tool.name)]
        if self._approvals is not None:
            far = self._approvals.allowed(tool)
            said = {"always": "always allowed", "conversation": "allowed here"}.get(far or "", "")
            if self._approvals.changed(tool):
                said = "changed, asks again"
            if said:
                parts.append(Content(f"  {said}").stylize("$warning"))
        about = " ".join(clean(tool.description).split())
        parts.append(Content(f"  {about[:80]}").stylize("$secondary"))
        return Content.assemble(*parts)

    @on(OptionList.OptionHighlighted)
    def _moved(self) -> None:
        self._log_shown = False
        self._describe()

    def _describe(self) -> None:
        """Say below what there is to say of the marked line."""
        row = self._row
        lines: list[Content]
        if row is None:
            lines = [Content(NOTHING)]
        elif isinstance(row, Tool):
            lines = [Content(clean(row.description) or "It says nothing of itself."), Content("")]
            lines += [reveal(line) for line in json.dumps(row.schema, ensure_ascii=False, indent=2).split("\n")]
        else:
            view = row
            log = clean(self._box.log(view.origin)).expandtabs(4).rstrip()
            if self._log_shown:
                lines = [Content(log or "Its log is empty.")]
            else:
                lines = [reveal(view.runs)]
                if view.trouble:
                    lines.append(Content(clean(view.trouble)).stylize("$error"))
                lines += [Content(clean(note)).stylize("$warning") for note in view.notes]
                if view.state == "idle":
                    lines.append(Content("It starts with your next message; R starts it now."))
                if log:
                    lines.append(Content(f"Log: {view.log} (L shows its end)").stylize("$secondary"))
        self.query_one("#about", Static).update(Content("\n").join(lines))
        scroll = self.query_one(VerticalScroll)
        # The end of a log is what one wants to see of it.
        self.call_after_refresh(scroll.scroll_end if self._log_shown else scroll.scroll_home, animate=False)

    @on(OptionList.OptionSelected)
    def action_switch(self) -> None:
        """Switch the marked server or tool on or off, for this conversation."""
        row = self._row
        if row is None:
            return
        key = row.key if isinstance(row, Tool) else row.origin
        if isinstance(row, Tool) and row.origin in self._off:
            self.notify("Its server is switched off.", markup=False)
            return
        self._off ^= {key}
        self.refresh_list()

    def action_log(self) -> None:
        """Show a server's log, or what it is."""
        if self._row is not None and not isinstance(self._row, Tool):
            self._log_shown = not self._log_shown
            self._describe()
        else:
            self.notify("A server has a log; mark one.", markup=False)

    def action_restart(self) -> None:
        """Start the marked line's server anew."""
        row = self._row
        if row is not None:
            self.run_worker(self._restart(row.origin), name="restart", group="restart")

    async def _restart(self, origin: str) -> None:
        self.notify("Starting.", markup=False)
        self.set_timer(LOOK_S, self.refresh_list)
        await self._box.restart(origin)
        if self.whole:
            self.refresh_list()

    def action_forget(self) -> None:
        """Ask about the marked tool again, or about all of a server's."""
        row = self._row
        if row is None or self._approvals is None:
            return
        for tool in (row,) if isinstance(row, Tool) else row.tools:
            self._approvals.forget(tool)
        self.refresh_list()

    def action_forget_all(self) -> None:
        """Ask about every tool again, also those that are not here now."""
        if self._approvals is not None:
            self._approvals.forget_all()
            self.notify("Every tool is asked about again.", markup=False)
            self.refresh_list()

    def action_close(self) -> None:
        """Leave with what is switched off."""
        self.dismiss(frozenset(self._off))
