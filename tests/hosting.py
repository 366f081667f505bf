"""Opens one screen of the chat in an app of its own, and drives it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.screen import ModalScreen
from textual.widgets import Static

from edger1.tui.themes import DARK, THEMES

SIZES = [(60, 15), (80, 24), (120, 40)]
Drive = Callable[[Pilot[None], "Host"], Awaitable[None]]
NOTHING = object()


class Host(App[None]):
    """Shows the screen that `make` returns and keeps its result."""

    VERTICAL_BREAKPOINTS = [(0, "-short"), (20, "-tall")]  # noqa: RUF012

    def __init__(self, make: Callable[[], ModalScreen[Any]], theme: str = DARK.name) -> None:
        super().__init__()
        for each in THEMES:
            self.register_theme(each)
        self.theme = theme
        self._make = make
        self.result: object = NOTHING

    def compose(self) -> ComposeResult:
        yield Static("The conversation.")

    def on_mount(self) -> None:
        self.push_screen(self._make(), self._take)

    def _take(self, result: object) -> None:
        self.result = result


def host(make: Callable[[], ModalScreen[Any]], drive: Drive, size: tuple[int, int] = (80, 24)) -> None:
    app = Host(make)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await drive(pilot, app)

    asyncio.run(asyncio.wait_for(run(), timeout=200))


def shown(app: App[Any]) -> str:
    """The text of the whole terminal, the screens below included."""
    return "\n".join("".join(part.text for part in line).rstrip() for line in app.screen._compositor.render_strips())


def words(app: App[Any]) -> str:
    """The text of the terminal as one line, without the frames that long sentences are broken at."""
    return " ".join(shown(app).translate(dict.fromkeys(map(ord, "│╭╮╰╯─▎▊"), " ")).split())


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        await pilot.pause(0.01)
        if condition():
            return
    raise AssertionError(f"this never came about; the screen was:\n{shown(pilot.app)}")
