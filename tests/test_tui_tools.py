"""The chat's side of tools: a call in the conversation, the question whether it may run, the list of tools."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chatting import until
from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Button, OptionList, Static

from edger1.tools import Approvals, Call, ServerView, Tool
from edger1.tui.screens.approve import QUIET_S, ApproveScreen
from edger1.tui.screens.tools import ToolsScreen
from edger1.tui.themes import DARK
from edger1.tui.widgets.arguments import argument_lines, reveal, summary
from edger1.tui.widgets.tool_call import CallTitle, CallView

SIZES = [(60, 15), (80, 24), (120, 40)]


class Host(App[None]):
    """Shows one widget, or one screen over a text box."""

    VERTICAL_BREAKPOINTS = [(0, "-short"), (20, "-tall")]  # noqa: RUF012

    def __init__(self, *shown: Widget, screen: Screen[Any] | None = None) -> None:
        super().__init__()
        self.shown = shown
        self.asked = screen
        self.answers: list[Any] = []

    def compose(self) -> Any:
        yield from self.shown or (Static("The conversation"),)

    def on_mount(self) -> None:
        self.register_theme(DARK)
        self.theme = DARK.name
        if self.asked is not None:
            self.push_screen(self.asked, self.answers.append)


Scenario = Callable[[Pilot[None], Host], Awaitable[None]]


def drive(host: Host, scenario: Scenario, size: tuple[int, int] = (80, 24)) -> None:
    async def run() -> None:
        async with host.run_test(size=size) as pilot:
            await pilot.pause()
            await scenario(pilot, host)

    asyncio.run(asyncio.wait_for(run(), 120))


def seen(host: Host) -> str:
    return "\n".join("".join(part.text for part in line).rstrip() for line in host.screen._compositor.render_strips())


TOOL = Tool("write_file", "Write a file.", {"type": "object"}, "mcp:files", "write_file", "npx server /home/me")
CALL = Call("1", "write_file", {"path": "a.txt", "content": "one\ntwo", "mode": 420})


# Arguments


def test_nothing_in_arguments_is_hidden() -> None:
    shown = reveal("a\x1b[31m\u202eb\u200bc\udc80[bold]é😀")
    assert shown.plain == "a\\x1b[31m\\u202eb\\u200bc\\udc80[bold]é😀"
    assert reveal("plain").plain == "plain"


def test_arguments_are_readable() -> None:
    lines = [line.plain for line in argument_lines({"path": "a", "text": "one\n\ttwo", "n": [1, {"b": None}]})]
    assert lines == ['path: "a"', "text: ", "  │ one", "  │ \\ttwo", 'n: [1, {"b": null}]']
    assert [line.plain for line in argument_lines({})] == ["no arguments"]
    assert len(argument_lines({"many": list(range(100))})) == 102
    assert summary({"a": "x" * 100, "b": 2}).plain == 'a="' + "x" * 38 + "…, b=2"


# A call


def test_the_stages_of_a_call() -> None:
    now = [100.0]
    view = CallView("write_file", CALL.arguments, origin="mcp:files", clock=lambda: now[0])

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert "was asked for and not run" in seen(host)
        await view.show("waiting")
        await pilot.pause()
        assert "▸ write_file · waits for your approval" in seen(host)
        assert view._ticking is None
        await view.show("running")
        now[0] += 3.0
        view._retitle()
        await pilot.pause()
        assert "running 3.0 s" in seen(host)
        await view.show("done", "written", 3.2)
        await pilot.pause()
        assert "▸ write_file · done in 3.2 s · path=" in seen(host)
        assert "written" not in seen(host)
        assert view._ticking is None, "an idle call keeps a timer"

    drive(Host(view), scenario)


@pytest.mark.parametrize(
    ("stage", "said"), [("failed", "failed in"), ("refused", "not allowed"), ("stopped", "stopped")]
)
def test_other_ends(stage: Any, said: str) -> None:
    view = CallView("add", {}, stage=stage, result="why", seconds=0.1)

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert said in seen(host)

    drive(Host(view), scenario)


def test_a_call_opens_and_folds_with_keys_and_mouse() -> None:
    view = CallView("write_file", CALL.arguments, origin="mcp:files", stage="done", result="[bold]written\x1b[2J")

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        view.query_one(CallTitle).focus()
        await pilot.press("enter")
        await pilot.pause()
        for each in ("▾ write_file", 'path: "a.txt"', "│ two", "mode: 420", "[bold]written[2J", "from mcp:files"):
            assert each in seen(host)
        await pilot.click(CallTitle)
        await pilot.pause()
        assert "written" not in seen(host)
        await pilot.press("enter")
        await pilot.pause()
        assert "written" in seen(host)

    drive(Host(view), scenario)


def test_a_large_result_comes_in_pages() -> None:
    view = CallView("read", {}, stage="done", result="\n".join(f"line {i}" for i in range(10_000)))

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        view.toggle()
        await pilot.pause()
        assert "line 39" in seen(host)
        assert "line 40" not in seen(host)
        assert "▾ 9,960 more lines" in seen(host)
        await pilot.click("More")
        await pilot.pause()
        assert "line 79" in seen(host)
        assert "▾ 9,920 more lines" in seen(host)

    drive(Host(view), scenario, (80, 100))


def test_a_result_that_comes_while_the_call_is_open() -> None:
    view = CallView("read", {"a": 1}, stage="running")

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        view.toggle()
        await pilot.pause()
        await view.show("done", "the result", 1.0)
        await pilot.pause()
        assert "the result" in seen(host)

    drive(Host(view), scenario)


# The question


def approve(call: Call = CALL, tool: Tool = TOOL, **more: Any) -> Host:
    return Host(screen=ApproveScreen(call, tool, **{"quiet_s": 0.01, **more}))


async def listens(pilot: Pilot[None], host: Host) -> None:
    """Wait until the question takes keys."""
    for _ in range(500):
        await pilot.pause(0.01)
        if not host.screen.query_one("#no", Button).disabled:
            return
    raise AssertionError("the question never takes keys")


@pytest.mark.parametrize("size", SIZES)
def test_the_question_shows_what_would_run(size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        for each in ("write_file", "mcp:files", "npx server /home/me", 'path: "a.txt"', "│ one", "│ two", "mode: 420"):
            assert each in seen(host), seen(host)
        for label in ("No", "Once", "This conversation", "Always"):
            assert label in seen(host)
        assert "It says of itself: Write a file." in seen(host)

    drive(approve(), scenario, size)


KEYS = [["enter"], ["a", "enter"], ["y", "o", "enter"], ["right", "enter"], ["tab", "enter"], ["escape"]]


@pytest.mark.parametrize("keys", KEYS)
def test_keys_that_were_typed_for_something_else_answer_nothing(keys: list[str]) -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        await pilot.press(*keys)
        await pilot.click("#always")
        await pilot.pause()
        assert host.answers == []
        assert isinstance(host.screen, ApproveScreen)

    drive(approve(quiet_s=60), scenario)


def test_typing_on_puts_the_answer_off() -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        screen = host.screen
        assert isinstance(screen, ApproveScreen)
        first = screen._quiet
        await pilot.press("right")
        assert screen._quiet is not first, "a key did not begin the wait again"
        screen._listen()
        listening = screen._quiet
        await pilot.press("right")
        assert screen._quiet is listening

    drive(approve(quiet_s=60), scenario)


def test_it_listens_after_the_wait_and_not_before() -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        await listens(pilot, host)
        assert time.monotonic() - begun > 0.3
        await pilot.press("enter")
        await pilot.pause()
        assert host.answers == ["no"]

    begun = time.monotonic()
    drive(approve(quiet_s=QUIET_S), scenario)


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        (["enter"], "no"),
        (["escape"], "no"),
        (["right", "enter"], "once"),
        (["right", "right", "enter"], "conversation"),
        (["right"] * 9 + ["enter"], "always"),
        (["right", "left", "left", "enter"], "no"),
        (["y", "a", "o", "1", "space", "enter"], "no"),
    ],
)
def test_answers_with_keys(keys: list[str], answer: str) -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        await listens(pilot, host)
        await pilot.press(*keys)
        await pilot.pause()
        assert host.answers == [answer]

    drive(approve(), scenario)


@pytest.mark.parametrize("answer", ["no", "once", "conversation", "always"])
def test_answers_with_the_mouse(answer: str) -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        await listens(pilot, host)
        await pilot.click(f"#{answer}")
        await pilot.pause()
        assert host.answers == [answer]

    drive(approve(), scenario, (60, 15))


def test_long_arguments_scroll_and_the_answers_stay() -> None:
    call = Call("1", "write_file", {"content": "\n".join(f"line {i}" for i in range(60))})

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        await listens(pilot, host)
        assert "│ line 59" not in seen(host)
        await pilot.press(*["pagedown"] * 20)
        await pilot.pause()
        assert "│ line 59" in seen(host)
        assert "This conversation" in seen(host)
        assert host.screen.query_one("#no", Button).has_focus

    drive(approve(call), scenario, (60, 15))


def test_a_tool_that_has_changed_is_told() -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert "It has changed since you always allowed it." in seen(host)

    drive(approve(changed=True), scenario, (60, 15))


def test_a_hostile_tool_cannot_pretend() -> None:
    tool = Tool("t", "\n" * 50 + "x" * 5_000, {}, "mcp:\x1b[2Jevil\u202e", "t", "r" * 2_000)
    call = Call("1", "t", {"[bold]\x07": "\u202egnp.exe"})

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert "mcp:\\x1b[2Jevil\\u202e" in seen(host)
        assert '[bold]\\x07: "\\u202egnp.exe"' in seen(host)
        assert "This conversation" in seen(host)

    drive(approve(call, tool), scenario, (60, 15))


# The list


@dataclass
class Box:
    views: list[ServerView]
    restarted: list[str] = field(default_factory=list)

    def servers(self) -> list[ServerView]:
        return self.views

    def log(self, origin: str) -> str:
        return "starting\nno such [b]database\x1b[2J" if origin == "mcp:broken" else ""

    async def restart(self, origin: str) -> None:
        self.restarted.append(origin)


class Memory:
    def __init__(self) -> None:
        self.keys: set[str] = set()

    def approvals(self) -> set[str]:
        return set(self.keys)

    def approve_always(self, key: str) -> None:
        self.keys.add(key)

    def forget_approval(self, key: str) -> None:
        self.keys.discard(key)


def listed() -> Box:
    other = Tool("read_file", "Read a file.\nAll of it.", {"type": "object"}, "mcp:files", "read_file", "npx server")
    function = Tool("double", "Twice.", {"type": "object"}, "python:tools.py", "double", "tools.py")
    return Box(
        [
            ServerView("files", "mcp:files", "ready", "", ("It lists 500 tools.",), "npx server", (TOOL, other), None),
            ServerView(
                "broken", "mcp:broken", "failed", "the server ended with exit code 3.", (), "bad", (), Path("l")
            ),
            ServerView("tools.py", "python:tools.py", "ready", "", (), "tools.py", (function,), None),
        ]
    )


@pytest.mark.parametrize("size", SIZES)
def test_the_list_of_tools(size: tuple[int, int]) -> None:
    box, approvals = listed(), Approvals(Memory())
    approvals.decide(TOOL, "always")

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        for each in ("[x] files  ready · 2 tools", "[x] write_file  always allowed", "[x] broken  failed"):
            assert each in seen(host), seen(host)
        await pilot.press("down", "space", "down", "down", "space", "l")
        await pilot.pause()
        assert "[ ] write_file" in seen(host)
        assert "[ ] broken" in seen(host)
        assert "no such [b]database[2J" in seen(host)
        await pilot.press("l")
        await pilot.pause()
        assert "exit code 3" in seen(host)
        await pilot.press("r")
        await pilot.pause()
        assert box.restarted == ["mcp:broken"]
        await pilot.press("up", "up", "f")
        await pilot.pause()
        assert "always allowed" not in seen(host)
        assert approvals.allowed(TOOL) is None
        await pilot.press("escape")
        await pilot.pause()
        assert host.answers == [frozenset({TOOL.key, "mcp:broken"})]

    drive(Host(screen=ToolsScreen(box, (), approvals)), scenario, size)


def test_switching_a_server_off_and_on() -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert "[ ] files" in seen(host)
        assert "    [ ] read_file" in seen(host)
        await pilot.press("enter")
        await pilot.pause()
        assert "    [x] read_file" in seen(host)
        await pilot.press("escape")
        await pilot.pause()
        assert host.answers == [frozenset()]

    drive(Host(screen=ToolsScreen(listed(), {"mcp:files"})), scenario)


def test_no_tools_at_all() -> None:
    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert "There are no tools. config.toml names" in seen(host)
        await pilot.press("space", "f", "l", "r", "escape")
        await pilot.pause()
        assert host.answers == [frozenset()]

    drive(Host(screen=ToolsScreen(Box([]))), scenario, (60, 15))


def test_a_server_that_is_starting_is_followed_until_it_is_ready() -> None:
    box = listed()
    ready = box.views[0]
    box.views[0] = ServerView("files", "mcp:files", "starting", "", (), "npx server", (), None)

    async def scenario(pilot: Pilot[None], host: Host) -> None:
        assert "files  starting" in seen(host)
        box.views[0] = ready
        await until(pilot, lambda: "files  ready" in seen(host))
        screen = host.screen
        assert isinstance(screen, ToolsScreen)
        assert not screen._looking
        assert screen.query_one(OptionList).option_count == 6

    drive(Host(screen=ToolsScreen(box)), scenario)


# Pictures


def past() -> list[CallView]:
    return [
        CallView("write_file", CALL.arguments, origin="mcp:files", stage="done", result="written\nok", seconds=0.3),
        CallView("read_file", {"path": "x" * 100}, stage="failed", result="no such file", seconds=12.0),
        CallView("search", {"words": ["a", "b"]}, stage="waiting"),
    ]


@pytest.fixture
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_plain_environment")
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_picture_of_the_question(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    async def settle(pilot: Pilot[None]) -> None:
        await listens(pilot, pilot.app)  # type: ignore[arg-type]
        await pilot.pause()

    assert snap_compare(approve(changed=True), terminal_size=size, run_before=settle)


@pytest.mark.usefixtures("_plain_environment")
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_picture_of_the_list(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    approvals = Approvals(Memory())
    approvals.decide(TOOL, "always")
    assert snap_compare(Host(screen=ToolsScreen(listed(), {"mcp:broken"}, approvals)), terminal_size=size)


@pytest.mark.usefixtures("_plain_environment")
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_picture_of_calls(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    async def open_first(pilot: Pilot[None]) -> None:
        pilot.app.query(CallView).first().toggle()
        await pilot.pause()

    assert snap_compare(Host(*past()), terminal_size=size, run_before=open_first)
