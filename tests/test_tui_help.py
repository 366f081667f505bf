"""The help screen and the command palette show the keys as they are."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from chatting import choose, screen, until
from textual.app import App
from textual.pilot import Pilot

from edger1.tui.commands_provider import PaletteCommand, provider_of
from edger1.tui.keymap import Keymap, read_keymap
from edger1.tui.screens.help import HelpScreen

SIZES = [(60, 15), (80, 24), (120, 40)]


@pytest.fixture
def keymap(tmp_path: Path) -> Keymap:
    (tmp_path / "keys.toml").write_text('new = "f11"\n')
    return read_keymap(tmp_path / "keys.toml")


@pytest.mark.parametrize("size", SIZES)
def test_help_shows_the_users_keys_and_is_searched(size: tuple[int, int], keymap: Keymap) -> None:
    async def run() -> None:
        app = App[None]()
        async with app.run_test(size=size) as pilot:
            app.push_screen(HelpScreen(keymap, [("/save FILE", "write the conversation as Markdown")]))
            await pilot.pause()
            assert "Send the message" in screen(app)
            await pilot.press(*"conv")
            shown = screen(app)
            assert "F11" in shown
            assert "New conversation" in shown
            assert "/save FILE" in shown
            assert "Send the message" not in shown
            assert "Ctrl+N" not in shown
            await pilot.press(*"zz")
            assert 'Nothing has "convzz" in it.' in screen(app)
            await pilot.press("escape")
            assert len(app.screen_stack) == 1

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_help_scrolls_without_leaving_the_search(keymap: Keymap) -> None:
    async def run() -> None:
        app = App[None]()
        async with app.run_test(size=(60, 15)) as pilot:
            app.push_screen(HelpScreen(keymap))
            await pilot.pause()
            assert "Back to the conversation" not in screen(app)
            await pilot.press(*["pagedown"] * 6)
            assert "Back to the conversation" in screen(app)
            await pilot.press(*"quit")
            assert "Ctrl+Q" in screen(app)

    asyncio.run(asyncio.wait_for(run(), timeout=90))


class Palette(App[None]):
    COMMANDS = {provider_of(lambda app: app.palette)}  # type: ignore[attr-defined]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []
        self.palette = [
            PaletteCommand(
                "New conversation", "Leave this one and begin another", lambda: self.done.append("new"), "F11"
            ),
            PaletteCommand("Hostile [bold]title", "[red]help", lambda: self.done.append("hostile")),
        ]


@pytest.mark.parametrize(
    ("typed", "did"), [("new", "new"), ("leave this", "new"), ("f11", "new"), ("hostile", "hostile")]
)
def test_the_palette_finds_commands_by_title_help_and_key(typed: str, did: str) -> None:
    async def run() -> None:
        app = Palette()
        async with app.run_test() as pilot:
            await pilot.press("ctrl+p")
            await pilot.pause()
            await shows(pilot, "New conversation  F11")
            await pilot.press(*(" " if each == " " else each for each in typed))
            await choose(pilot, {"new": "New conversation", "hostile": "Hostile [bold]title"}[did])
            await until(pilot, lambda: app.done == [did])

    asyncio.run(asyncio.wait_for(run(), timeout=90))


async def shows(pilot: Pilot[Any], words: str) -> None:
    await until(pilot, lambda: words in screen(pilot.app))
