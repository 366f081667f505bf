"""One answer at a time, which can be stopped from the moment it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from chatting import drive, screen, settle, until
from fake_backend import FIGURES, HOLD, FakeBackend, Step, words
from textual.pilot import Pilot

from edger1.messages import Done, Loaded, Text, ToolCall
from edger1.tools import Result, Tool
from edger1.tools.loop import CallState
from edger1.tui.app import ChatApp
from edger1.tui.session import Ended, Rewound, Session, State
from edger1.tui.settings import Settings
from edger1.tui.tree import Node
from edger1.tui.widgets.answer_text import AnswerText
from edger1.tui.widgets.prompt import Prompt

P = Pilot[None]
CALLING: list[Step] = [ToolCall("", "add", {"a": 2}, "c1"), Done("", "tools")]


class SlowTools:
    """A toolbox whose one tool waits for `begin` before it can be called."""

    def __init__(self) -> None:
        self.begin = asyncio.Event()
        self.calls = 0

    async def ready(self, off: Any = ()) -> tuple[Tool, ...]:
        await self.begin.wait()
        return self.list(off)

    def list(self, off: Any = ()) -> tuple[Tool, ...]:
        return (Tool("add", "Adds.", {"type": "object"}, "python:here"),)

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        self.calls += 1
        return Result("4")


async def yes(call: object, tool: object) -> bool:
    return True


async def play(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


async def ready(backend: FakeBackend, **given: Any) -> Session:
    session = Session(backend, model="smollm2", **given)
    await play(session.load())
    return session


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, timeout=60))


async def came(condition: Callable[[], bool]) -> None:
    """Wait for something; the scenario's own time ends that."""
    while not condition():
        await asyncio.sleep(0.001)


def test_an_answer_is_stopped_while_its_tools_are_started() -> None:
    async def scenario() -> None:
        backend, tools = FakeBackend(), SlowTools()
        session = await ready(backend, tools=tools)
        asking = asyncio.create_task(play(session.ask(Node("user", "a"))))
        await came(lambda: session.state is State.ANSWERING)
        assert session.stop()
        tools.begin.set()
        assert isinstance((await asking)[-1], Rewound)
        assert backend.asked == []
        assert (session.state, session.tree.path()) == (State.READY, [])

    run(scenario())


def test_an_answer_is_stopped_between_its_words_and_its_calls() -> None:
    async def scenario() -> None:
        backend, tools = FakeBackend(CALLING, [Text("", "Four."), FIGURES]), SlowTools()
        tools.begin.set()
        session = await ready(backend, tools=tools, approve=yes)
        events: list[Any] = []
        async for event in session.ask(Node("user", "2 + 2?")):
            events.append(event)
            if isinstance(event, Ended):
                assert session.state is State.ANSWERING
                assert session.stop()
        assert tools.calls == 0
        assert [each.stage for each in events if isinstance(each, CallState)] == ["stopped"]
        assert len(backend.asked) == 1
        assert session.state is State.READY

    run(scenario())


@pytest.mark.parametrize("settings", [Settings(), Settings(samples=3)], ids=["one", "samples"])
def test_a_title_that_is_being_asked_for_is_no_reason_not_to_be_busy(settings: Settings) -> None:
    async def scenario() -> None:
        backend = FakeBackend([Text("", "One."), FIGURES], [HOLD, FIGURES])
        session = await ready(backend)
        await play(session.ask(Node("user", "a")))
        session.talk.id = "saved"
        session.talk.settings = settings
        naming = asyncio.create_task(session.name())
        await came(lambda: len(backend.asked) == 2)
        asking = asyncio.create_task(play(session.ask(Node("user", "b"))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert session.state is State.ANSWERING
        assert session.stop()
        await asyncio.gather(naming, asking)
        assert len(backend.asked) == 2
        assert (session.state, [node.text for node in session.tree.path()]) == (State.READY, ["a", "One."])

    run(scenario())


def test_a_title_gives_way_to_another_model() -> None:
    async def scenario() -> None:
        backend = FakeBackend([Text("", "One."), FIGURES], [Text("", "Tit"), HOLD, Text("", "le"), FIGURES])
        session = await ready(backend)
        await play(session.ask(Node("user", "a")))
        session.talk.id = "saved"
        naming = asyncio.create_task(session.name())
        await came(lambda: len(backend.asked) == 2)
        assert isinstance((await play(session.load()))[-1], Loaded)
        assert backend.cancel_count == 1
        assert naming.done()
        assert session.talk.title is None
        assert session.state is State.READY

    run(scenario())


def test_a_key_that_is_pressed_twice_asks_once() -> None:
    backend = FakeBackend([*words("One."), Done("", "length")], [Text("", "Two"), HOLD, *words(" and."), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        app.query_one(Prompt).restore("one?")
        await pilot.press("enter")
        await until(pilot, lambda: "One." in screen(app) and app.session.state is State.READY)
        app.action_retry()
        app.action_retry()
        await until(pilot, lambda: "Two" in screen(app))
        await pilot.pause()
        assert len(backend.asked) == 2
        backend.release()
        await until(pilot, lambda: app.session.state is State.READY)
        await app.action_continue()
        await app.action_continue()
        backend.release()
        await until(pilot, lambda: len(backend.asked) > 2 and app.session.state is State.READY)
        assert len(backend.asked) == 3

    drive(backend, scenario)


@pytest.mark.parametrize("finish", ["tools", "cancelled"])
def test_another_conversation_is_shown_while_an_answer_ends(finish: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last code of an answer takes its time for its colours; what comes below it has no place any more then."""
    coming, go_on = asyncio.Event(), asyncio.Event()
    ends = AnswerText.finish

    async def slowly(text: AnswerText) -> None:
        coming.set()
        await go_on.wait()
        await ends(text)

    monkeypatch.setattr(AnswerText, "finish", slowly)
    backend = FakeBackend([*words("Look: "), HOLD, *(CALLING if finish == "tools" else [Done("", "cancelled")])])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        app.query_one(Prompt).restore("2 + 2?")
        await pilot.press("enter")
        await until(pilot, lambda: "Look:" in screen(app))
        if finish == "cancelled":
            app.session.stop()
        else:
            backend.release()
        try:
            await until(pilot, coming.is_set)
            await app.action_new()
        finally:
            go_on.set()
        await settle(pilot, app)
        assert "Look:" not in screen(app)

    drive(backend, scenario)
