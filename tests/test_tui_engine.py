"""The chat while its engine starts, fails, dies and is closed."""

from __future__ import annotations

import asyncio

import pytest
from chatting import drive, screen, settle, until
from fake_backend import FIGURES, GONE, HOLD, FakeBackend, words
from textual.pilot import Pilot

from edger1.messages import Failed, Loaded, Progress, Text
from edger1.tui.app import ChatApp
from edger1.tui.session import State
from edger1.tui.widgets.prompt import Prompt


def test_loading_shows_progress_and_takes_a_message() -> None:
    backend = FakeBackend(loads=[[Progress("", "load", 49_000_000, 98_000_000), HOLD, Loaded("", "m")]])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await until(pilot, lambda: "50% of 98 MB" in screen(app))
        assert "You can type" in screen(app)
        await pilot.press("a", "enter")
        assert "▌ a" in screen(app)
        assert backend.asked == []
        backend.release()
        await settle(pilot, app)
        assert "Hello." in screen(app)

    drive(backend, scenario)


def test_a_message_that_waits_can_be_taken_back() -> None:
    backend = FakeBackend(loads=[[HOLD, Loaded("", "m")]])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter", "b", "enter")
        assert app.query_one(Prompt).text == "b"
        await pilot.press("escape")
        assert app.query_one(Prompt).text == "a\n\nb"
        assert "▌ a" not in screen(app)
        backend.release()
        await settle(pilot, app)

    drive(backend, scenario)
    assert backend.asked == []


def test_a_model_that_does_not_load_is_explained_and_tried_again() -> None:
    damaged = Failed("", "FormatError", "model.safetensors ends too early; pull it again.")
    backend = FakeBackend(loads=[[HOLD, damaged], [Loaded("", "m")]])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        backend.release()
        await settle(pilot, app)
        assert "model.safetensors ends too early" in screen(app)
        assert "Send a message to start the engine again" in screen(app)
        assert app.query_one(Prompt).text == "a"
        await pilot.press("enter")
        await settle(pilot, app)
        assert "Hello." in screen(app)

    drive(backend, scenario)
    assert backend.load_count == 2


def test_a_dead_engine_costs_no_conversation() -> None:
    backend = FakeBackend([*words("half an ans"), GONE], [Text("", "better now"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await settle(pilot, app)
        shown = screen(app)
        assert "half an ans" in shown
        assert "memory ran out" in shown
        await pilot.press("b", "enter")
        await settle(pilot, app)
        assert "half an ans" in screen(app)
        assert "better now" in screen(app)

    drive(backend, scenario)
    assert backend.load_count == 2
    assert [message["content"] for message in backend.asked[1]] == ["a", "half an ans", "b"]


def test_a_request_refused_leaves_the_engine_and_the_text() -> None:
    refused = Failed("", "ContextError", "The conversation has 9,000 tokens and the context holds 8,192.")
    backend = FakeBackend([refused], [Text("", "fine"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await settle(pilot, app)
        assert "the context holds 8,192" in screen(app)
        assert app.query_one(Prompt).text == "a"
        await pilot.press("b", "enter")
        await settle(pilot, app)
        assert "fine" in screen(app)

    drive(backend, scenario)
    assert backend.load_count == 1
    assert [message["content"] for message in backend.asked[1]] == ["ab"]


def test_an_engine_that_dies_behind_a_new_conversation_is_started_for_it() -> None:
    backend = FakeBackend([Text("", "x"), HOLD, GONE], [Text("", "here"), FIGURES])
    backend.cancel = lambda: None  # type: ignore[method-assign]  # it dies instead of stopping

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: app.session.state is State.ANSWERING)
        await pilot.press("ctrl+n", "b", "enter")
        backend.release()
        await settle(pilot, app)
        await settle(pilot, app)
        assert "here" in screen(app)

    drive(backend, scenario)
    assert backend.load_count == 2


def test_the_engine_is_closed_when_the_chat_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1 import tui

    async def no_terminal(self: ChatApp) -> None:
        async with self.run_test() as pilot:
            await pilot.press("ctrl+q")

    monkeypatch.setattr(ChatApp, "run_async", no_terminal)
    backend = FakeBackend()
    tui.run_chat(backend, "m")
    assert backend.closed


@pytest.mark.parametrize("taken_back", [False, True])
def test_a_message_that_is_sent_while_loading_ends_is_asked_once_it_is_shown(
    taken_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FakeBackend([*words("Four."), FIGURES], loads=[[HOLD, Loaded("", "m")]])
    begun, go_on = asyncio.Event(), asyncio.Event()
    leave = ChatApp.leave_welcome

    async def slowly(app: ChatApp) -> None:
        if not go_on.is_set():
            begun.set()
            await go_on.wait()
        await leave(app)

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.LOADING)
        monkeypatch.setattr(ChatApp, "leave_welcome", slowly)
        app.query_one(Prompt).restore("2 + 2?")
        app.query_one(Prompt).focus()
        app.query_one(Prompt).action_send()
        await begun.wait()
        backend.release()
        try:
            for _ in range(500):
                if app.session.state is not State.LOADING:
                    break
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert backend.asked == []
            if taken_back:
                assert app.waiting is not None
                await app.take_back(app.waiting)
        finally:
            go_on.set()
        if taken_back:
            await until(pilot, lambda: app.placing is None)
            assert app.query_one(Prompt).text == "2 + 2?"
            assert "▌ 2 + 2?" not in screen(app)
            assert backend.asked == []
        else:
            await until(pilot, lambda: "Four." in screen(app))
            assert screen(app).index("2 + 2?") < screen(app).index("Four.")
            assert len(backend.asked) == 1

    drive(backend, scenario)
