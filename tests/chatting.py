"""Drives the chat with a scripted engine, and reads its screen."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from fake_backend import FakeBackend
from textual.command import Command, CommandList
from textual.pilot import Pilot
from textual.worker import WorkerCancelled

from edger1.tui.app import ChatApp
from edger1.tui.settings import Settings

Scenario = Callable[[Pilot[None], ChatApp], Awaitable[None]]


def drive(
    backend: FakeBackend,
    scenario: Scenario,
    size: tuple[int, int] = (80, 24),
    system: str | None = None,
    model: str | None = "smollm2-135m",
    settings: Settings | None = None,
    **given: Any,
) -> None:
    app = ChatApp(backend, model, settings=settings or Settings(system), **given)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await scenario(pilot, app)

    asyncio.run(asyncio.wait_for(run(), timeout=200))


def screen(app: ChatApp) -> str:
    return "\n".join("".join(part.text for part in line).rstrip() for line in app.screen._compositor.render_strips())


async def settle(pilot: Pilot[None], app: ChatApp) -> None:
    """Wait until the engine's work is done and drawn."""
    for _ in range(100):
        # What is colouring code, or looking for files, may be called off; the others go on.
        with suppress(WorkerCancelled):
            await app.workers.wait_for_complete()
            break
    await pilot.pause()


async def choose(pilot: Pilot[Any], title: str) -> None:
    """Take the command of the open palette that is called this, once what was typed has brought it to the top."""
    palette = pilot.app.screen

    def first() -> str | None:
        (found,) = palette.query(CommandList)
        option = found.get_option_at_index(0) if found.option_count else None
        return option.hit.text if isinstance(option, Command) else None

    await until(pilot, lambda: first() == title)
    # What comes in meanwhile takes the cursor away, which Enter then only puts back. It is not pressed again at once:
    # the command would be taken twice.
    for _ in range(10):
        await pilot.press("enter")
        for _ in range(100):
            await asyncio.sleep(0.02)
            if pilot.app.screen is not palette:
                await pilot.pause()
                return
    raise AssertionError(f"the palette stayed; the screen was:\n{screen(pilot.app)}")  # type: ignore[arg-type]


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Wait for something that happens while an answer is held."""
    loop = asyncio.get_running_loop()
    end = loop.time() + 20
    while loop.time() < end:
        # A pause waits for each widget, which is most of the work where it is done again and again.
        await asyncio.sleep(0.01)
        if condition():
            await pilot.pause(0)
            return
    raise AssertionError(f"this never came about; the screen was:\n{screen(pilot.app)}")  # type: ignore[arg-type]
