"""The place to type alone, in a tiny program with something above it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from textual.app import App, ComposeResult
from textual.containers import VerticalScroll
from textual.pilot import Pilot
from textual.widgets import Static

from edger1.tui.mentions import Command
from edger1.tui.tree import Attachment
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.prompt_area import PromptArea

SIZES = [(60, 15), (80, 24), (120, 40)]


async def _adapters(typed: str) -> Sequence[str]:
    await asyncio.sleep(0)
    return ["off", "runs/maths", "runs/my words"]


COMMANDS = [
    Command("adapter", "put an adapter over the model", "DIR|off", _adapters),
    Command("model", "choose another model", "NAME", lambda typed: ["nano-moe", "smollm2-135m"]),
    Command("new", "begin a conversation"),
    Command("rename", "give it a title", "TITLE"),
]


class PromptApp(App[None]):
    def __init__(self, root: Path, past: Sequence[str] = (), *, taking: bool = True) -> None:
        super().__init__()
        self.area = PromptArea()
        self.area.prompt.root = root
        self.area.prompt.past = list(past)
        self.area.prompt.commands = COMMANDS
        self.sent: list[tuple[str, tuple[Attachment, ...]]] = []
        self.given: list[tuple[str, str]] = []
        self.drafts = 0
        self._taking = taking

    def compose(self) -> ComposeResult:
        with VerticalScroll(can_focus=False):
            yield Static("\n".join(f"line {number}" for number in range(60)))
        yield self.area

    def on_mount(self) -> None:
        self.area.prompt.focus()

    def on_prompt_submitted(self, event: Prompt.Submitted) -> None:
        self.sent.append((event.text, event.attachments))
        if self._taking:
            self.area.prompt.taken()

    def on_prompt_command_given(self, event: Prompt.CommandGiven) -> None:
        self.given.append((event.name, event.argument))

    def on_prompt_drafted(self) -> None:
        self.drafts += 1

    @property
    def notices(self) -> str:
        return " ".join(str(notice.message) for notice in self._notifications)

    @property
    def shown(self) -> str:
        strips = self.screen._compositor.render_strips()
        return "\n".join("".join(part.text for part in line).rstrip() for line in strips)


Scenario = Callable[[Pilot[None], PromptApp, Prompt], Awaitable[None]]


def typing(app: PromptApp, scenario: Scenario, size: tuple[int, int] = (80, 24)) -> None:
    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await scenario(pilot, app, app.area.prompt)

    asyncio.run(asyncio.wait_for(run(), timeout=200))


async def until(pilot: Pilot[None], app: PromptApp, condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        if condition():
            await pilot.pause()
            return
        await pilot.pause(0.02)
    raise AssertionError(f"this never came about; the screen was:\n{app.shown}")
