"""A conversation that outgrows its context: the command that lets its oldest turns go, and what is said of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chatting import drive, screen, until
from fake_backend import FIGURES, HOLD, FakeBackend, words
from textual.pilot import Pilot

from edger1.messages import Done, Failed
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.session import State
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.widgets.prompt import Prompt

P = Pilot[None]
NOTE = "The context of 8192 tokens was full: 4100 tokens in its middle were dropped, the 3 oldest turns among them."
SHIFTED = replace(FIGURES, notes=[NOTE])
FULL = Failed("", "ContextError", "The prompt has 9000 tokens.")


async def send(pilot: P, app: ChatApp, text: str) -> None:
    await until(pilot, lambda: app.session.state is State.READY)
    app.query_one(Prompt).restore(text)
    await pilot.press("enter")


def test_a_conversation_that_is_told_to_goes_on_and_says_what_it_lost(tmp_path: Path) -> None:
    backend = FakeBackend([FULL], [*words("It goes on."), SHIFTED], [*words("A title"), FIGURES])
    store = Store.open(tmp_path / "c.db")

    async def scenario(pilot: P, app: ChatApp) -> None:
        await send(pilot, app, "Go on?")
        # Who has not asked for it loses nothing, and is told what to do.
        await until(pilot, lambda: "9000 tokens" in screen(app))
        assert "/shift on drops the oldest turns" in screen(app)
        assert app.query_one(Prompt).text == "Go on?"
        await send(pilot, app, "/shift on")
        await until(pilot, lambda: "context shift" in screen(app))
        await send(pilot, app, "Go on?")
        await until(pilot, lambda: "4100 tokens in its middle were dropped" in screen(app))
        assert "It goes on." in screen(app)
        assert screen(app).count("were dropped") == 1
        await until(pilot, lambda: len(backend.asked) == 3)
        # A title is asked of the same conversation, which has not grown shorter.
        assert [each.context_shift for each in backend.settings] == [False, True, True]
        await pilot.press("ctrl+n")
        await until(pilot, lambda: "Ready. Ask anything." in screen(app))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edger1.tui.base.NAME_AFTER_S", 0.05)
        drive(backend, scenario, size=(140, 24), belongings=Belongings(store=store))

    async def again(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: "It goes on." in screen(app))
        assert app.session.talk.settings == Settings(context_shift=True)
        # What the model does not know of a conversation is so on another day too.
        assert screen(app).count("4100 tokens in its middle were dropped") == 1
        assert "context shift" in screen(app)

    store = Store.open(tmp_path / "c.db")
    drive(FakeBackend(), again, size=(140, 24), belongings=Belongings(store=store), resume=store.list()[0].id)


def test_what_is_said_of_an_answer_stays_with_it() -> None:
    stopped = Done("", "cancelled", notes=[NOTE])
    backend = FakeBackend([*words("The first."), SHIFTED], [*words("The second"), HOLD, stopped])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await send(pilot, app, "Go on?")
        await until(pilot, lambda: "were dropped" in screen(app))
        await pilot.press("f7")
        await until(pilot, lambda: "The second" in screen(app))
        assert "were dropped" not in screen(app)
        # It is shown as stopped at once; what is to be said of it comes with its end.
        await pilot.press("escape")
        await until(pilot, lambda: "were dropped" in screen(app))
        assert "Stopped." in screen(app)
        await pilot.press("alt+left")
        await until(pilot, lambda: "The first." in screen(app))
        assert screen(app).count("were dropped") == 1

    drive(backend, scenario, size=(140, 24))


def test_a_context_that_is_full_in_spite_of_it_is_no_reason_to_ask_for_it() -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await send(pilot, app, "Go on?")
        await until(pilot, lambda: "9000 tokens" in screen(app))
        assert "/shift" not in screen(app)
        assert "Change your message" in screen(app)

    drive(FakeBackend([FULL]), scenario, settings=Settings(context_shift=True))
