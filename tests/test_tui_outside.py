"""What comes from outside the chat: what is pasted, imported, or said by an engine, however odd it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chatting import drive, screen, until
from fake_backend import FIGURES, FakeBackend, words
from fake_catalogue import FakeCatalogue
from textual import events
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from edger1.messages import Text
from edger1.tools import Toolbox
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.screens.conversations import ConversationsScreen
from edger1.tui.screens.settings import SettingsScreen
from edger1.tui.session import State
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.store.imports import bring_in
from edger1.tui.store.records import Stored
from edger1.tui.tree import Node, Tree
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.turn import Editor

P = Pilot[None]
HOSTILE = "a\x1b]0;title\x07b\x85c\u202ed"
TAMED = "a]0;titlebcd"


@pytest.fixture(autouse=True)
def _no_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edger1.tui.base.NAME_AFTER_S", 600)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "c.db")


def safe(app: ChatApp) -> bool:
    return not any(each in screen(app) for each in "\x1b\x07\x85\u202e")


async def ask(pilot: P, app: ChatApp, text: str, answer: str) -> None:
    await until(pilot, lambda: app.session.state is State.READY)
    app.query_one(Prompt).restore(text)
    await pilot.press("enter")
    await until(pilot, lambda: answer in screen(app) and app.session.state is State.READY)


def test_what_is_pasted_anywhere_is_text_and_nothing_a_terminal_would_obey(store: Store) -> None:
    async def paste(pilot: P, app: ChatApp) -> None:
        app.post_message(events.Paste(HOSTILE))
        await pilot.pause()

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "one?", "Hello.")
        await paste(pilot, app)
        assert app.query_one(Prompt).text == TAMED
        await pilot.press("f5")
        await until(pilot, lambda: len(app.query(Editor)) == 1)
        await paste(pilot, app)
        assert app.query_one(Editor).text == f"one?{TAMED}"
        await pilot.press("escape", "f3")
        await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
        app.screen.query_one(TextArea).focus()
        await paste(pilot, app)
        assert app.screen.query_one(TextArea).text == TAMED
        await pilot.press("escape", "ctrl+o")
        await until(pilot, lambda: isinstance(app.screen, ConversationsScreen))
        await paste(pilot, app)
        assert app.screen.query_one("#search", Input).value == TAMED
        assert safe(app)
        # Lines stay lines, however the terminal ends them.
        await pilot.press("escape", "escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        app.query_one(Prompt).restore("")
        app.query_one(Prompt).focus()
        app.post_message(events.Paste("a\r\nb\rc"))
        await until(pilot, lambda: app.query_one(Prompt).text == "a\nb\nc")

    drive(FakeBackend(), scenario, belongings=Belongings(store=store))


def test_what_was_imported_is_edited_as_text(store: Store) -> None:
    tree = Tree()
    asked = tree.add(Node("user", HOSTILE))
    tree.add(Node("assistant", "Hm.", parent=asked.id, finish="stop"))
    store.insert(Stored("x" * 32, HOSTILE, tree, Settings(system=HOSTILE)))

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: "Hm." in screen(app))
        await pilot.press("f5")
        await until(pilot, lambda: len(app.query(Editor)) == 1)
        assert app.query_one(Editor).text == TAMED
        assert safe(app)
        await pilot.press("escape", "f3")
        await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
        assert app.screen.query_one(TextArea).text == TAMED
        await pilot.press("escape", "ctrl+o")
        await until(pilot, lambda: isinstance(app.screen, ConversationsScreen) and "Hm" not in screen(app))
        await pilot.press("ctrl+r")
        await until(pilot, lambda: app.screen.query_one("#line", Input).has_focus)
        assert app.screen.query_one("#line", Input).value == "a]0;titleb cd"
        assert safe(app)

    drive(FakeBackend(), scenario, belongings=Belongings(store=store), resume="x" * 32)


def test_half_a_character_is_copied_as_what_it_looks_like() -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "one?", "Half")
        await pilot.press("f9")
        assert app.clipboard == "Half \ufffd"
        app.action_copy("all")
        assert app.clipboard.endswith("Half \ufffd\n")

    drive(FakeBackend([Text("", "Half \ud83d"), FIGURES]), scenario)


@pytest.mark.parametrize(
    "figures",
    [
        {"usage": 5, "figures": "none"},
        {"figures": {"context_size": "8192", "context_used": []}, "usage": {"prompt_tokens": {}}},
        {"figures": {"experts": {"decode": 3}, "drafts": {"off": ""}}},
        {"notes": 7, "vote": {"tally": [["a", "b"], 3]}},
        {"figures": {"decode_tokens_per_s": 4.0, "context_size": 100, "context_used": 7}, "notes": ["It is so."]},
    ],
    ids=range(5),
)
def test_figures_that_another_program_wrote_are_left_out_where_they_are_none(
    store: Store, tmp_path: Path, figures: dict[str, object]
) -> None:
    file = tmp_path / "in.json"
    messages = [
        {"id": "a", "parent": None, "role": "user", "text": "one?", "created_at": 1.0},
        {"id": "b", "parent": "a", "role": "assistant", "text": "Hm.", "created_at": 2.0, "figures": figures},
    ]
    file.write_text(json.dumps({"format": "edger1-conversation", "version": 1, "id": "c", "messages": messages}))
    bring_in(store, file)

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: "Hm." in screen(app))
        await pilot.press("shift+tab", "i")
        whole = "notes" in figures and "figures" in figures
        await until(pilot, lambda: ("4.0 tok/s" if whole else "Nothing was measured") in screen(app))
        assert ("It is so." in screen(app)) is whole

    drive(FakeBackend(), scenario, belongings=Belongings(store=store), resume="c")


def test_a_path_that_is_none_is_said_and_the_chat_goes_on(store: Store, tmp_path: Path) -> None:
    there = tmp_path / "there.md"
    there.write_text("mine")
    paths = {
        "/export ~nobody-of-this-name/x.md": "no user",
        f"/export {tmp_path}/{'x' * 300}.md": "too long",
        f"/export {there}": "there already",
        "/import ~nobody-of-this-name/x.json": "no user",
        f"/import {tmp_path}/{'x' * 300}.json": "too long",
    }

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "one?", "Hello.")
        for typed, reason in paths.items():
            app.query_one(Prompt).restore(typed)
            await pilot.press("enter")
            await until(pilot, lambda reason=reason: any(reason in each.message for each in app._notifications))
            app.clear_notifications()
        assert there.read_text() == "mine"
        # Without a name it gets one, and twice in a row another.
        for _ in range(2):
            app.query_one(Prompt).restore("/export")
            await pilot.press("enter")
            await until(pilot, lambda: any("Written to" in each.message for each in app._notifications))
            app.clear_notifications()
        await pilot.press("ctrl+o")
        await until(pilot, lambda: isinstance(app.screen, ConversationsScreen))
        await pilot.press("ctrl+e")
        await until(pilot, lambda: app.screen.query_one("#line", Input).has_focus)
        for path, reason in (("~nobody-of-this-name/x.md", "no user"), (f"{tmp_path}/{'x' * 300}.md", "too long")):
            app.screen.query_one("#line", Input).value = path
            await pilot.press("enter")
            await until(pilot, lambda reason=reason: reason in app.screen._said)

    drive(FakeBackend(), scenario, size=(140, 24), belongings=Belongings(store=store, exports=tmp_path))
    assert sorted(each.name for each in tmp_path.glob("*.md")) == ["conversation-2.md", "conversation.md", "there.md"]


def test_wide_letters_keep_the_line_of_figures_whole() -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "one?", "Hello.")
        app.stage.say("Loading 深度求索模型")
        await until(pilot, lambda: "深度求索模型" in screen(app))
        line = next(each for each in screen(app).splitlines() if "深度求索模型" in each)
        assert line.rstrip().endswith(app.stage.status._fields[0].long) or "tok/s" in line
        assert app.stage.status.render().cell_length == app.stage.status.content_size.width
        app.stage.say("深" * 100)
        await pilot.pause()
        assert app.stage.status.render().cell_length == app.stage.status.content_size.width

    drive(FakeBackend([*words("Hello."), FIGURES]), scenario)


@pytest.mark.parametrize("key", ["f2", "f3", "f6", "f8", "ctrl+o", "ctrl+p"])
def test_a_terminal_of_next_to_no_size_is_gone_through(store: Store, key: str) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        await pilot.press(key)
        await until(pilot, lambda: len(app.screen_stack) == 2)
        await pilot.pause()
        for size in ((3, 2), (1, 1), (80, 3), (4, 24)):
            await pilot.resize_terminal(*size)
            await pilot.press("pagedown", "pageup")
        await pilot.resize_terminal(80, 24)
        await pilot.press("pagedown", "escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)

    toolbox = Toolbox(functions=[sum_of])
    drive(FakeBackend(), scenario, belongings=Belongings(store=store, catalogue=FakeCatalogue(), toolbox=toolbox))


def sum_of(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b
