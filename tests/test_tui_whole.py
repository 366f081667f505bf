"""The chat with all its parts: conversations that outlive it, branches, models, tools, commands and keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chatting import drive, screen, settle, until
from fake_backend import FIGURES, GONE, HOLD, FakeBackend, words
from fake_catalogue import FakeCatalogue
from textual.pilot import Pilot

from edger1.messages import Done, Failed, Figures, Loaded, Running, Text, Thought, ToolCall
from edger1.tools import Approvals, Toolbox, function_tool
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.presets import Presets
from edger1.tui.screens.approve import ApproveScreen
from edger1.tui.screens.conversations import ConversationsScreen
from edger1.tui.screens.engine import EngineScreen
from edger1.tui.screens.first_run import FirstRunScreen
from edger1.tui.screens.help import HelpScreen
from edger1.tui.screens.models import ModelsScreen
from edger1.tui.screens.settings import SettingsScreen
from edger1.tui.screens.themes import ThemeScreen
from edger1.tui.screens.tools import ToolsScreen
from edger1.tui.session import State
from edger1.tui.store import Store
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.transcript import Transcript

P = Pilot[None]


def kept(tmp_path: Path, **more: Any) -> Belongings:
    """What a user's chat has, in a folder of the test."""
    store = Store.open(tmp_path / "conversations.db")
    return Belongings(
        store=store,
        catalogue=FakeCatalogue(),
        presets=Presets(tmp_path / "presets.toml"),
        approvals=Approvals(store),
        memory_bytes=16 << 30,
        ceiling_bytes=8 << 30,
        exports=tmp_path,
        **more,
    )


@pytest.fixture(autouse=True)
def _no_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine would ask for one between two keys."""
    monkeypatch.setattr("edger1.tui.base.NAME_AFTER_S", 600)


async def ask(pilot: P, app: ChatApp, text: str) -> None:
    prompt = app.query_one(Prompt)
    await until(pilot, lambda: app.session.state is State.READY)
    prompt.restore(text)
    await pilot.press("enter")
    await settle(pilot, app)


async def command(pilot: P, app: ChatApp, text: str) -> None:
    app.query_one(Prompt).restore(text)
    await pilot.press("enter")
    await settle(pilot, app)


async def enter(pilot: P, app: ChatApp, key: str, kind: type) -> None:
    await pilot.press(key)
    await until(pilot, lambda: isinstance(app.screen, kind))


def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async def first(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a cat")
        await ask(pilot, app, "a dog")
        app.query_one(Prompt).restore("half a thou")
        await app.recorder.settled()  # type: ignore[union-attr]
        app.keep_draft()
        await app.recorder.close()  # type: ignore[union-attr]

    backend = FakeBackend([Thought("", "hm"), Text("", "meow"), FIGURES], [Text("", "woof"), FIGURES])
    drive(backend, first, belongings=kept(tmp_path))

    async def second(pilot: P, app: ChatApp) -> None:
        await enter(pilot, app, "ctrl+o", ConversationsScreen)
        await pilot.press(*"meow")
        await until(pilot, lambda: "1 place" in screen(app) or "meow" in screen(app))
        await pilot.pause(0.3)
        await pilot.press("enter")
        await until(pilot, lambda: "woof" in screen(app))
        shown = screen(app)
        assert "a cat" in shown
        assert "meow" in shown
        assert "▸ Thought for" in shown
        assert app.query_one(Prompt).text == "half a thou"
        await ask(pilot, app, "a cow")
        assert [each["content"] for each in again.asked[0]] == ["a cat", "meow", "a dog", "woof", "a cow"]

    again = FakeBackend([Text("", "moo"), FIGURES])
    drive(again, second, belongings=kept(tmp_path))


def test_a_conversation_is_opened_at_once_where_its_id_is_given(tmp_path: Path) -> None:
    belongings = kept(tmp_path)

    async def first(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a cat")
        await app.recorder.settled()  # type: ignore[union-attr]

    drive(FakeBackend([Text("", "meow"), FIGURES]), first, belongings=belongings)
    assert belongings.store is not None

    async def second(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: "meow" in screen(app))

    drive(FakeBackend(), second, belongings=belongings, resume=belongings.store.list()[0].id)


def test_another_answer_is_a_branch_that_can_be_switched(tmp_path: Path) -> None:
    backend = FakeBackend([Text("", "first try"), FIGURES], [Text("", "second try"), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await pilot.press("f7")
        await settle(pilot, app)
        assert "second try" in screen(app)
        assert "first try" not in screen(app)
        assert "2/2" in screen(app)
        await pilot.press("alt+left")
        await until(pilot, lambda: "first try" in screen(app))
        assert "1/2" in screen(app)
        assert "second try" not in screen(app)

    drive(backend, scenario, belongings=kept(tmp_path))


def test_the_last_question_is_edited_in_its_place(tmp_path: Path) -> None:
    backend = FakeBackend([Text("", "one"), FIGURES], [Text("", "two"), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "what is 1")
        await pilot.press("f5")
        await pilot.pause()
        await pilot.press("end", "backspace", "2", "enter")
        await settle(pilot, app)
        await until(pilot, lambda: "two" in screen(app))
        assert "what is 2" in screen(app)
        assert "one" not in screen(app)

    drive(backend, scenario, belongings=kept(tmp_path))
    assert [each["content"] for each in backend.asked[1]] == ["what is 2"]


def test_a_stopped_answer_goes_on(tmp_path: Path) -> None:
    backend = FakeBackend([*words("first half, "), HOLD, FIGURES], [*words("second half."), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        app.query_one(Prompt).restore("a")
        await pilot.press("enter")
        await until(pilot, lambda: "first half" in screen(app))
        await pilot.press("escape")
        await settle(pilot, app)
        assert "Stopped." in screen(app)
        await command(pilot, app, "/continue")
        assert "first half, second half." in screen(app)
        assert "Stopped." not in screen(app)

    drive(backend, scenario, belongings=kept(tmp_path))
    assert backend.continued == [False, True]


def test_a_branch_from_an_earlier_answer(tmp_path: Path) -> None:
    backend = FakeBackend(*[[Text("", f"answer {n}"), FIGURES] for n in (1, 2, 3)])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await ask(pilot, app, "b")
        first = app.session.tree.path()[1]
        app.query_one(Transcript).post_message(Transcript.Act(first.id, "branch"))
        await until(pilot, lambda: "answer 2" not in screen(app))
        await ask(pilot, app, "c")
        assert [each["content"] for each in backend.asked[2]] == ["a", "answer 1", "c"]
        assert "2/2" in screen(app)

    drive(backend, scenario, belongings=kept(tmp_path))


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("ctrl+o", ConversationsScreen),
        ("f2", ModelsScreen),
        ("f3", SettingsScreen),
        ("f4", EngineScreen),
        ("f8", ThemeScreen),
        ("f1", HelpScreen),
    ],
)
@pytest.mark.parametrize("size", [(60, 15), (120, 40)], ids="{0[0]}x{0[1]}".format)
def test_every_screen_opens_by_its_key_and_closes_by_escape(
    tmp_path: Path, key: str, kind: type, size: tuple[int, int]
) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await settle(pilot, app)
        await enter(pilot, app, key, kind)
        await pilot.pause(0.1)
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, kind))
        await pilot.press("x")
        assert app.query_one(Prompt).text == "x"

    drive(FakeBackend(), scenario, size=size, belongings=kept(tmp_path))


def test_keys_of_an_open_screen_are_its_own(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await enter(pilot, app, "f3", SettingsScreen)
        await pilot.press("ctrl+n")
        await pilot.pause(0.2)
        assert len(app.screen_stack) == 3
        await pilot.press("escape", "escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert len(app.session.tree) == 2

    drive(FakeBackend(), scenario, belongings=kept(tmp_path))


def test_settings_hold_from_the_next_answer_on(tmp_path: Path) -> None:
    backend = FakeBackend()

    async def scenario(pilot: P, app: ChatApp) -> None:
        await command(pilot, app, "/system Be brief.")
        await command(pilot, app, "/think off")
        await ask(pilot, app, "a")

    drive(backend, scenario, belongings=kept(tmp_path))
    assert backend.asked[0][0] == {"role": "system", "content": "Be brief."}
    assert backend.settings[0].think == "off"


def test_another_model_answers_in_the_same_conversation(tmp_path: Path) -> None:
    backend = FakeBackend([Text("", "one"), FIGURES], [Text("", "two"), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await command(pilot, app, "/model /some/model")
        await until(pilot, lambda: backend.load_count == 2)
        await ask(pilot, app, "b")
        assert app.session.model == "model"

    drive(backend, scenario, belongings=kept(tmp_path))
    assert [each[0] for each in backend.chosen] == ["model"]
    assert [each["content"] for each in backend.asked[1]] == ["a", "one", "b"]


def test_a_model_that_cannot_be_loaded_leaves_all_as_it_was(tmp_path: Path) -> None:
    loads = [[Loaded("", "m")], [Failed("", "MemoryLimitError", "It needs 9 GB.")], [Loaded("", "m")]]
    backend = FakeBackend([Text("", "one"), FIGURES], [Text("", "two"), FIGURES], loads=loads)

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await command(pilot, app, "/model /some/model")
        await until(pilot, lambda: "It needs 9 GB." in screen(app))
        assert "one" in screen(app)
        await command(pilot, app, "/model /some/model")
        await ask(pilot, app, "b")
        assert "two" in screen(app)

    drive(backend, scenario, belongings=kept(tmp_path))


def test_without_a_model_the_first_screen_recommends_some(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: isinstance(app.screen, FirstRunScreen))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, FirstRunScreen))
        assert "Choose a model" in screen(app)
        app.query_one(Prompt).restore("hello")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen))

    drive(FakeBackend(), scenario, model=None, belongings=kept(tmp_path))


def adding(ran: list[tuple[int, int]]) -> Toolbox:
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        ran.append((a, b))
        return a + b

    return Toolbox(functions=[function_tool(add)])


CALLING = [ToolCall("", "add", {"a": 2, "b": 2}, "c1"), Done("", "tools")]


@pytest.mark.parametrize("answer", ["once", "no"])
def test_a_tool_runs_only_after_the_user_said_so(tmp_path: Path, answer: str) -> None:
    ran: list[tuple[int, int]] = []
    backend = FakeBackend(CALLING, [Text("", "Done with it."), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        app.query_one(Prompt).restore("2 + 2?")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ApproveScreen))
        assert ran == []
        await pilot.pause(0.5)
        await pilot.click(f"#{answer}")
        await until(pilot, lambda: "Done with it." in screen(app))
        assert "add" in screen(app)

    drive(backend, scenario, belongings=kept(tmp_path, toolbox=adding(ran)))
    assert ran == ([(2, 2)] if answer == "once" else [])
    assert ("4" if answer == "once" else "not allow") in backend.asked[1][-1]["content"]


def test_escape_refuses_a_tool_and_stops_the_answer(tmp_path: Path) -> None:
    ran: list[tuple[int, int]] = []

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        app.query_one(Prompt).restore("2 + 2?")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ApproveScreen))
        await pilot.pause(0.5)
        await pilot.press("escape")
        await until(pilot, lambda: app.session.state is State.READY)

    drive(FakeBackend(CALLING, [Text("", "x"), FIGURES]), scenario, belongings=kept(tmp_path, toolbox=adding(ran)))
    assert ran == []


@pytest.mark.parametrize("under", [False, True], ids=["on top", "under another"])
def test_a_question_whose_answer_was_stopped_is_asked_no_longer(tmp_path: Path, under: bool) -> None:
    ran: list[tuple[int, int]] = []

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        app.query_one(Prompt).restore("2 + 2?")
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ApproveScreen))
        if under:
            app.push_screen(ThemeScreen())
            await until(pilot, lambda: isinstance(app.screen, ThemeScreen))
        # As the palette does, which opens over a question too.
        await app.action_new()
        await until(pilot, lambda: app.session.state is State.READY)
        if under:
            # The question is still below, and goes as soon as it is on top.
            assert any(isinstance(each, ApproveScreen) for each in app.screen_stack)
            await pilot.press("escape")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        await pilot.pause()

    drive(FakeBackend(CALLING, [Text("", "x"), FIGURES]), scenario, belongings=kept(tmp_path, toolbox=adding(ran)))
    assert ran == []


def test_tools_can_be_switched_off(tmp_path: Path) -> None:
    backend = FakeBackend()

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await enter(pilot, app, "f6", ToolsScreen)
        await pilot.pause(0.2)
        await pilot.press("space", "escape")
        await until(pilot, lambda: not isinstance(app.screen, ToolsScreen))
        await ask(pilot, app, "b")

    drive(backend, scenario, belongings=kept(tmp_path, toolbox=adding([])))
    assert [len(each) for each in backend.tools] == [1, 0]


def test_figures_run_along_and_the_engine_screen_has_them(tmp_path: Path) -> None:
    figures = Figures(decode_tokens_per_s=51.5, context_used=100, context_size=4096)
    backend = FakeBackend([Text("", "x"), Running("r", figures), HOLD, FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        app.query_one(Prompt).restore("a")
        await pilot.press("enter")
        await until(pilot, lambda: "51.5 tok/s" in screen(app))
        await enter(pilot, app, "f4", EngineScreen)
        await until(pilot, lambda: "context 100 / 4,096" in screen(app))
        await pilot.press("escape")
        backend.release()
        await settle(pilot, app)

    drive(backend, scenario, belongings=kept(tmp_path))


def test_an_engine_that_dies_takes_no_word_with_it(tmp_path: Path) -> None:
    belongings = kept(tmp_path)

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        assert "half an ans" in screen(app)
        assert "killed by the system" in screen(app)
        await app.recorder.settled()  # type: ignore[union-attr]

    drive(FakeBackend([*words("half an ans"), GONE]), scenario, belongings=belongings)
    assert belongings.store is not None
    stored = belongings.store.load(belongings.store.list()[0].id)
    assert [node.text for node in stored.tree.path()] == ["a", "half an ans"]


def test_a_conversation_is_named_when_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edger1.tui.base.NAME_AFTER_S", 0.05)
    backend = FakeBackend([Text("", "meow"), FIGURES], [Text("", "What cats say"), FIGURES])

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a cat")
        await until(pilot, lambda: "What cats say" in screen(app))

    drive(backend, scenario, belongings=kept(tmp_path))


def test_a_conversation_is_renamed_pinned_exported_and_deleted(tmp_path: Path) -> None:
    belongings = kept(tmp_path)
    store = belongings.store
    assert store is not None

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a cat")
        await command(pilot, app, "/title About cats")
        assert "About cats" in screen(app)
        await command(pilot, app, "/pin")
        assert store.list()[0].pinned
        await command(pilot, app, f"/export {tmp_path / 'cats.md'}")
        assert "a cat" in (tmp_path / "cats.md").read_text()
        await command(pilot, app, "/delete")
        assert store.list() == []
        assert "Ready. Ask anything." in screen(app)

    drive(FakeBackend([Text("", "meow"), FIGURES]), scenario, belongings=belongings)


def test_what_is_wrong_with_a_command_is_said(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await settle(pilot, app)
        for text, said in [
            ("/modle", "/model"),
            ("/think hard", "auto, on or off"),
            ("/import nowhere.json", "nowhere.json"),
            ("/theme pink", "pink"),
        ]:
            await command(pilot, app, text)
            await until(pilot, has(app, said))

    drive(FakeBackend(), scenario, size=(120, 40), belongings=kept(tmp_path))


def has(app: ChatApp, said: str) -> Callable[[], bool]:
    return lambda: said in screen(app) or any(said in each.message for each in app._notifications)


def test_commands_are_in_the_palette_with_their_keys(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await settle(pilot, app)
        await pilot.press("ctrl+p")
        await until(pilot, lambda: len(app.screen_stack) > 1)
        await pilot.press(*"engine")
        await until(pilot, lambda: "F4" in screen(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: isinstance(app.screen, EngineScreen))

    drive(FakeBackend(), scenario, size=(100, 30), belongings=kept(tmp_path))


def test_a_failure_inside_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGER1_DEBUG", raising=False)
    app = ChatApp(FakeBackend(), "m", belongings=kept(tmp_path))

    async def run() -> None:
        async with app.run_test() as pilot:
            app.call_later(lambda: 1 / 0)
            await pilot.pause()

    with pytest.raises(ZeroDivisionError):
        asyncio.run(asyncio.wait_for(run(), timeout=90))
    app._fatal_error()
    told = " ".join(str(each) for each in app._exit_renderables)
    assert "division by zero" in told
    assert "This is a bug" in told
    assert "Traceback" not in told
