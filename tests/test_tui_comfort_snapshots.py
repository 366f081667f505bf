"""Pictures of the engine, the help and the themes. A wanted change is accepted with pytest --snapshot-update."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_tui_engine_screen import history
from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen

from edger1.tui.keymap import Keymap
from edger1.tui.screens.engine import EngineScreen
from edger1.tui.screens.help import HelpScreen
from edger1.tui.screens.themes import ThemeScreen
from edger1.tui.themes import COLOURLESS, THEMES

SIZES = [(60, 15), (80, 24), (120, 40)]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def host(screen: Screen[Any], theme: str = "edger1-dark") -> App[None]:
    class Host(App[None]):
        def on_mount(self) -> None:
            self.push_screen(screen)

    app = Host(ansi_color=True if theme == COLOURLESS.name else None)
    for each in (*THEMES, COLOURLESS):
        app.register_theme(each)
    app.theme = theme
    return app


def press(*keys: str) -> Callable[[Pilot[Any]], Any]:
    async def run(pilot: Pilot[Any]) -> None:
        await pilot.press(*keys)
        await pilot.pause()

    return run


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_engine(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    app = host(EngineScreen(history(50), "qwen3-30b-a3b"))
    assert snap_compare(app, terminal_size=size, run_before=press("down", "left"))


@pytest.mark.parametrize("theme", ["edger1-light", "edger1-contrast", COLOURLESS.name])
def test_engine_by_expert(snap_compare: Callable[..., bool], theme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if theme == COLOURLESS.name:
        monkeypatch.setenv("NO_COLOR", "1")
    app = host(EngineScreen(history(50), "qwen3-30b-a3b"), theme)
    assert snap_compare(app, terminal_size=(80, 24), run_before=press("tab", "down", "right"))


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_help(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    assert snap_compare(host(HelpScreen(Keymap())), terminal_size=size)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_themes(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    assert snap_compare(host(ThemeScreen()), terminal_size=size, run_before=press("down", "down"))
