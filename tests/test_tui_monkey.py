"""A user who presses whatever comes to hand, and what that has found: screens that come and go between two keys."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import monkey
import pytest
from chatting import drive, until
from fake_backend import FakeBackend
from textual.pilot import Pilot
from textual.widgets import Input

from edger1.tui.app import ChatApp
from edger1.tui.screens.confirm import ConfirmScreen
from edger1.tui.screens.help import HelpScreen
from edger1.tui.screens.models import ModelsScreen
from edger1.tui.session import State

P = Pilot[None]


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_pressed_the_chat_goes_on(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edger1.tui.base.NAME_AFTER_S", 0.05)
    monkeypatch.chdir(tmp_path)
    monkey.play(seed, tmp_path, 60)


def test_a_key_before_a_screen_is_whole_does_nothing(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        screen = HelpScreen(app.belongings.keymap)
        assert screen.check_action("dismiss", ()) is False
        await app.push_screen(screen)
        assert screen.check_action("dismiss", ())

    drive(FakeBackend(), scenario, belongings=monkey.belongings(tmp_path, random.Random(0)))


def test_a_screen_ends_once_and_after_what_is_over_it(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        below, above = ConfirmScreen("Below?", yes="Yes", no="No"), ConfirmScreen("Above?", yes="Yes", no="No")
        said: list[tuple[str, bool | None]] = []
        await app.push_screen(below, lambda answer: said.append(("below", answer)))
        await app.push_screen(above, lambda answer: said.append(("above", answer)))
        below.dismiss(True)
        assert app.screen is above
        above.dismiss(False)
        above.dismiss(True)
        await until(pilot, lambda: len(app.screen_stack) == 1)
        below.dismiss(False)
        await asyncio.sleep(0.05)
        assert said == [("above", False), ("below", True)]

    drive(FakeBackend(), scenario)


def test_keys_that_come_before_the_models_are_listed(tmp_path: Path) -> None:
    async def scenario(pilot: P, app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        for key in ("f2", "down", "enter", "slash", "q", "w", "pagedown", "escape"):
            monkey.press(app, key)
        monkey.press(app, "f2")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and bool(app.screen.query(Input)))

    drive(FakeBackend(), scenario, belongings=monkey.belongings(tmp_path, random.Random(0)))
