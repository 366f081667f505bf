"""The chat's keys and commands for thinking, samples and drafts, and what they show."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from chatting import drive, screen, until
from fake_backend import FIGURES, HOLD, FakeBackend, words
from textual.pilot import Pilot

from edger1.cli.chat import chat_command
from edger1.cli.chat_window import Wanted
from edger1.errors import UsageError
from edger1.messages import Done, Running, Text, Thought
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.presets import Presets
from edger1.tui.screens.settings import SettingsScreen
from edger1.tui.session import State
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.widgets.prompt import Prompt

P = Pilot[None]
DRAFTS = {"drafted": 20, "accepted": 15, "steps": 9, "gain": 1.5, "sources": {}, "off": ""}
DRAFTED = replace(FIGURES, figures=replace(FIGURES.figures, drafts=DRAFTS))
THOUGHT = replace(DRAFTED, usage=replace(DRAFTED.usage, thought_tokens=1234))


@pytest.fixture(autouse=True)
def _no_titles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine would ask for one between two keys."""
    monkeypatch.setattr("edger1.tui.base.NAME_AFTER_S", 600)


def kept(folder: Path) -> Belongings:
    return Belongings(store=Store.open(folder / "c.db"), presets=Presets(folder / "presets.toml"))


def now(app: ChatApp) -> Settings:
    return app.session.talk.settings


def told(app: ChatApp, words: str) -> bool:
    return any(words in each.message for each in app._notifications)


async def command(pilot: P, app: ChatApp, text: str, said: str) -> None:
    app.query_one(Prompt).restore(text)
    await pilot.press("enter")
    await until(pilot, lambda: told(app, said))


async def ask(pilot: P, app: ChatApp, text: str) -> None:
    await until(pilot, lambda: app.session.state is State.READY)
    app.query_one(Prompt).restore(text)
    await pilot.press("enter")


def test_a_small_screen_takes_all_of_it_by_keys_and_commands(tmp_path: Path) -> None:
    backend = FakeBackend(
        [*words("It is 5."), DRAFTED],
        [Thought("", "hm"), *words("It is **4**\x1b[2J."), THOUGHT],
        [*words("It is **4**\x1b[2J."), DRAFTED],
    )

    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        await pilot.press("x", "alt+t", "alt+b", "backspace")
        assert now(app) == Settings(think="on", think_budget=500)
        await until(pilot, lambda: told(app, "Thinking: on."))
        await until(pilot, lambda: "thinking on, ≤ 500 tokens of thought" in screen(app))
        await command(pilot, app, "/think auto", "Thinking: auto, ≤ 500 tokens")
        await command(pilot, app, "/budget 20-2000", "20–2,000 tokens of thought.")
        await command(pilot, app, "/speculate lookup", "Drafts: lookup.")
        await command(pilot, app, "/samples 3", "3 answers to each question")
        assert now(app) == Settings(think_budget=2000, think_at_least=20, samples=3, speculate="lookup")
        await command(pilot, app, "/budget much", "expected tokens")
        await pilot.press("f3")
        await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: len(app.screen_stack) == 1)
        assert now(app) == Settings(think_budget=2000, think_at_least=20, samples=3, speculate="lookup")
        await ask(pilot, app, "2 + 2?")
        await until(pilot, lambda: "votes" in screen(app))
        await until(pilot, lambda: app.session.state is State.READY)
        shown = screen(app)
        # The winner is there with its thought, beside the others, above what the settings and its drafts are.
        assert "It is 4[2J." in shown
        assert "It is 5.\n" not in shown
        assert "1 word · 1,234 tokens" in shown
        assert "‹ 2/3 ›   votes" in shown
        assert ": 2 · " in shown
        assert "20–2,000 3× lookup" in shown
        await pilot.press("alt+left")
        await until(pilot, lambda: "It is 5." in screen(app))
        assert "‹ 1/3 ›   votes" in screen(app)
        await command(pilot, app, "/think off", "Thinking: off")
        await until(pilot, lambda: "think off ≤2,000 3× lookup ·  48.3 tok/s" in screen(app))

    drive(backend, scenario, size=(60, 15), belongings=kept(tmp_path))
    assert [each.samples for each in backend.settings] == [3]

    async def again(pilot: P, app: ChatApp) -> None:
        # All of it is there after a restart: the conversation's settings and the vote.
        await until(pilot, lambda: "votes" in screen(app))
        assert now(app) == Settings(think="off", think_budget=2000, samples=3, speculate="lookup")
        assert "drafts lookup" in screen(app)

    belongings = kept(tmp_path)
    assert belongings.store is not None
    drive(FakeBackend(), again, belongings=belongings, resume=belongings.store.list()[0].id)


def test_samples_are_counted_while_they_run_and_stopped_together(tmp_path: Path) -> None:
    live = replace(FIGURES.figures, drafts={**DRAFTS, "gain": None})
    backend = FakeBackend(
        [*words("The first, "), Running("", live), HOLD, *words("to its end."), DRAFTED],
        [*words("Other."), DRAFTED],
        [HOLD, Text("", "Never."), Done("", "stop")],
    )

    async def scenario(pilot: P, app: ChatApp) -> None:
        await ask(pilot, app, "a")
        await until(pilot, lambda: "1 of 3 done" in screen(app))
        assert "The first," in screen(app)
        await until(pilot, lambda: "drafts  75%" in screen(app))
        app.query_one(Prompt).restore("b")
        await pilot.press("enter")
        await until(pilot, lambda: told(app, "still coming"))
        await pilot.press("escape")
        await until(pilot, lambda: app.session.state is State.READY and "Other." in screen(app))
        assert "Never" not in screen(app)
        assert "‹ 2/2 ›   votes Other.: 1" in screen(app)
        assert backend.cancel_count == 1
        await pilot.press("shift+tab", "i")
        await until(pilot, lambda: "1.5 times as fast" in screen(app))
        await pilot.press("escape", "alt+left")
        await until(pilot, lambda: "Stopped." in screen(app))
        assert "The first," in screen(app)
        # Ctrl+P finds what needs nothing to be typed after it, and goes on to the next choice.
        await pilot.press("ctrl+p", *"several answers")
        await until(pilot, lambda: "Draw several answers" in screen(app))
        await asyncio.sleep(1.0)
        await pilot.press("enter")
        await until(pilot, lambda: now(app).samples == 5)

    drive(backend, scenario, size=(120, 40), belongings=kept(tmp_path), settings=Settings(samples=3))


def test_the_command_line_sets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Wanted] = []
    monkeypatch.setattr("edger1.cli.chat_window.open_window", lambda wanted, config: opened.append(wanted))
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    chat_command("m", system="S", think="on", think_budget=9, think_at_least=3, samples=5, speculate="lookup")
    chat_command("m", draft="small", context_shift=True)
    assert [each.settings for each in opened] == [
        Settings("S", think="on", think_budget=9, think_at_least=3, samples=5, speculate="lookup"),
        Settings(speculate="auto", context_shift=True),
    ]
    assert [each.draft for each in opened] == [None, "small"]
    with pytest.raises(UsageError, match="think_budget"):
        chat_command("m", think_budget=2, think_at_least=3)
