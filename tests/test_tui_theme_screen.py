"""Choosing a theme with the keyboard, seeing it before it is taken."""

from __future__ import annotations

import asyncio

import pytest
from chatting import screen
from textual.app import App, ComposeResult
from textual.widgets import Static

from edger1.tui.screens.themes import ThemeScreen
from edger1.tui.themes import THEMES


class Host(App[None]):
    def __init__(self) -> None:
        super().__init__()
        for theme in THEMES:
            self.register_theme(theme)
        self.theme = "edger1-dark"
        self.chosen: list[str | None] = []

    def compose(self) -> ComposeResult:
        yield Static("Words")


@pytest.mark.parametrize("size", [(60, 15), (80, 24), (120, 40)])
def test_the_theme_under_the_cursor_is_shown_and_taken_or_left(size: tuple[int, int]) -> None:
    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            app.push_screen(ThemeScreen(), app.chosen.append)
            await pilot.pause()
            assert "edger1-light" in screen(app)
            assert "contrast 10.8 · Enter, Esc" in screen(app)
            await pilot.press("down")
            assert app.theme == "edger1-light"
            await pilot.press("escape")
            assert (app.theme, app.chosen) == ("edger1-dark", [None])
            app.push_screen(ThemeScreen(), app.chosen.append)
            await pilot.pause()
            await pilot.press("down", "down")
            assert "contrast 17.0" in screen(app)
            await pilot.press("enter")
            assert (app.theme, app.chosen) == ("edger1-contrast", [None, "edger1-contrast"])

    asyncio.run(asyncio.wait_for(run(), timeout=90))
