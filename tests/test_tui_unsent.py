"""What was typed and is not answered yet is never lost: while it waits, while it is edited, when its answer is left."""

from __future__ import annotations

from pathlib import Path

import pytest
from chatting import drive, screen, until
from fake_backend import FIGURES, HOLD, FakeBackend, words
from textual.pilot import Pilot

from edger1.messages import Done, Loaded, Text
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.session import State
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.tree import Attachment
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.transcript import Transcript
from edger1.tui.widgets.turn import Editor

P = Pilot[None]
LOADING = [[HOLD, Loaded("", "smollm2")]]


@pytest.fixture(autouse=True)
def _no_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edger1.tui.base.NAME_AFTER_S", 600)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "c.db")


def again(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "c.db")


def typed(app: ChatApp) -> str:
    return app.query_one(Prompt).text


async def send(pilot: P, app: ChatApp, text: str) -> None:
    app.query_one(Prompt).restore(text)
    await pilot.press("enter")
    await until(pilot, lambda: typed(app) == "")


async def answered(pilot: P, app: ChatApp, text: str, answer: str) -> None:
    await until(pilot, lambda: app.session.state is State.READY)
    await send(pilot, app, text)
    await until(pilot, lambda: answer in screen(app) and app.session.state is State.READY)


def test_a_message_that_waits_for_the_model_outlives_the_program(store: Store, tmp_path: Path) -> None:
    async def first(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.LOADING)
        app.query_one(Prompt).restore("What is that?", [Attachment("a.txt", "words")])
        await pilot.press("enter")
        await until(pilot, lambda: app.waiting is not None)
        app.query_one(Prompt).restore("and more")
        await pilot.press("ctrl+q")

    drive(FakeBackend(loads=LOADING), first, belongings=Belongings(store=store))

    async def second(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: typed(app) == "What is that?\n\nand more")
        assert app.query_one(Prompt).draft[1] == (Attachment("a.txt", "words"),)
        # Once it is asked it is no draft any more.
        await pilot.press("enter")
        backend.release()
        await until(pilot, lambda: "Yes." in screen(app))

    backend = FakeBackend([*words("Yes."), FIGURES], loads=LOADING)
    drive(backend, second, belongings=Belongings(store=again(tmp_path)))
    assert again(tmp_path).draft(None) == ("", ())


def test_a_message_that_waits_stays_with_who_wrote_it(store: Store, tmp_path: Path) -> None:
    other = store.create(model="m", settings=Settings())

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.LOADING)
        await send(pilot, app, "What is that?")
        # A new conversation: it is in the box, and can be sent there.
        await pilot.press("ctrl+n")
        await until(pilot, lambda: typed(app) == "What is that?")
        await pilot.press("enter")
        await until(pilot, lambda: app.waiting is not None)
        # Another conversation: it is where it was written.
        await app.open_conversation(other)
        assert typed(app) == ""
        assert app.waiting is None
        await app.action_quit()

    drive(FakeBackend(loads=LOADING), scenario, belongings=Belongings(store=store))
    assert again(tmp_path).draft(None)[0] == "What is that?"


def test_a_question_that_is_left_before_its_answer_is_typed_when_one_comes_back(store: Store) -> None:
    backend = FakeBackend([*words("One."), FIGURES], [HOLD, *words("Two."), FIGURES])
    other = store.create(model="m", settings=Settings())

    async def scenario(pilot: P, app: ChatApp) -> None:
        await answered(pilot, app, "one?", "One.")
        here = app.session.talk.id
        assert here is not None
        await send(pilot, app, "and two?")
        await until(pilot, lambda: len(backend.asked) == 2)
        await app.open_conversation(other)
        await until(pilot, lambda: app.session.state is State.READY)
        assert app.recorder is not None
        await app.recorder.settled()
        await until(pilot, lambda: store.draft(here)[0] == "and two?")
        assert typed(app) == ""
        await app.open_conversation(here)
        assert typed(app) == "and two?"

    drive(backend, scenario, belongings=Belongings(store=store))


def test_each_conversation_keeps_its_own_draft_while_another_is_drawn(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.create(model="m", settings=Settings())
    store.save_draft(other, "of the other")
    draw = Transcript.clear

    async def drawn_slowly(self: Transcript) -> None:
        # As a long conversation is: what was typed is saved meanwhile.
        self.app.keep_draft()  # type: ignore[attr-defined]
        await draw(self)

    async def scenario(pilot: P, app: ChatApp) -> None:
        await answered(pilot, app, "one?", "Hello.")
        here = app.session.talk.id
        app.query_one(Prompt).restore("of this one")
        monkeypatch.setattr(Transcript, "clear", drawn_slowly)
        await app.open_conversation(other)
        assert app.recorder is not None
        await app.recorder.settled()
        assert (store.draft(other)[0], store.draft(here)[0]) == ("of the other", "of this one")
        # The one that is open already has what was typed a moment ago.
        app.query_one(Prompt).restore("typed at last")
        await app.open_conversation(other)
        assert typed(app) == "typed at last"

    drive(FakeBackend(), scenario, belongings=Belongings(store=store))


def test_what_goes_along_into_a_new_conversation_does_not_stay_behind(store: Store) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await answered(pilot, app, "one?", "Hello.")
        here = app.session.talk.id
        assert here is not None
        app.query_one(Prompt).restore("on second thoughts")
        app.keep_draft()
        await pilot.press("ctrl+n")
        await until(pilot, lambda: app.session.talk.id is None)
        assert typed(app) == "on second thoughts"
        assert app.recorder is not None
        await app.recorder.settled()
        assert store.draft(here)[0] == ""

    drive(FakeBackend(), scenario, belongings=Belongings(store=store))


def test_an_edit_that_cannot_be_asked_yet_is_not_thrown_away() -> None:
    backend = FakeBackend(
        [*words("One."), FIGURES], [Text("", "Two"), HOLD, Done("", "stop")], [*words("Ten."), FIGURES]
    )

    async def scenario(pilot: P, app: ChatApp) -> None:
        await answered(pilot, app, "one?", "One.")
        await send(pilot, app, "two?")
        await until(pilot, lambda: "Two" in screen(app))
        await pilot.press("f5")
        await until(pilot, lambda: len(app.query(Editor)) == 1)
        await pilot.press(*" or ten?", "enter")
        await until(pilot, lambda: any("still coming" in each.message for each in app._notifications))
        await until(pilot, lambda: len(app.query(Editor)) == 1)
        assert app.query_one(Editor).text == "two? or ten?"
        backend.release()
        await until(pilot, lambda: app.session.state is State.READY)
        await pilot.press("enter")
        await until(pilot, lambda: "Ten." in screen(app))
        assert [node.text for node in app.session.tree.path()][2] == "two? or ten?"
        assert not app.query(Editor)

    drive(backend, scenario)
