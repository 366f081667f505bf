"""A user who presses whatever comes to hand while the engine does whatever it may: for faults that need bad luck."""

from __future__ import annotations

import asyncio
import random
import unicodedata
from contextlib import suppress
from pathlib import Path

from fake_backend import FIGURES, GONE, HOLD, FakeBackend, Step
from fake_catalogue import FakeCatalogue
from textual import events
from textual.errors import NoWidget
from textual.keys import _get_unicode_name_from_key
from textual.pilot import OutOfBounds, Pilot

from edger1.messages import Done, Failed, Figures, Loaded, Progress, Running, Text, Thought, ToolCall
from edger1.tools import Approvals, Toolbox
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.keymap import COMMANDS
from edger1.tui.presets import Presets
from edger1.tui.session import State
from edger1.tui.settings import Settings
from edger1.tui.store import Store

LEAVING = ("quit", "copy_or_quit")
KEYS = [key for each in COMMANDS if each.id not in LEAVING for key in each.keys]
MOVES = [
    "enter",
    "escape",
    "up",
    "down",
    "left",
    "right",
    "home",
    "end",
    "tab",
    "shift+tab",
    "pageup",
    "pagedown",
    "backspace",
    "delete",
    "space",
    "y",
    "n",
]
WORDS = (
    "2 + 2?",
    "Tell me a story",
    "é語👩‍🔬 and more",
    "@",
    "@a.txt ",
    "line\nline",
    "x" * 3000,
    "```python\nprint(1)\n```",
)
SAID = (
    "Four. ",
    "A **long** story about `code`: ",
    "\n\n```python\ndef f(x):\n    return x + 1\n```\n\n",
    "\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n",
    "$\\frac{1}{2}$ and é語👩‍🔬. ",
    "\n- one\n- two\n  1. three\n",
    "```",
)
SIZES = ((80, 24), (120, 40), (60, 15), (20, 5), (200, 60))


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def script(rng: random.Random) -> list[Step]:
    """An answer as an engine might give it."""
    steps: list[Step] = [Progress("", "prefill", 10, 20)] if rng.random() < 0.3 else []
    for _ in range(rng.randrange(3) if rng.random() < 0.4 else 0):
        steps.append(Thought("", rng.choice(SAID)))
    for _ in range(rng.randrange(1, 8)):
        kind = rng.random()
        if kind < 0.2:
            steps.append(HOLD)
        elif kind < 0.3:
            steps.append(Running("", Figures(decode_tokens_per_s=40.0)))
        else:
            steps.append(Text("", rng.choice(SAID)))
    end = rng.random()
    if end < 0.15:
        steps += [ToolCall("", "add", {"a": 2, "b": 2}, f"c{rng.random()}"), Done("", "tools")]
    elif end < 0.25:
        steps.append(Failed("", "ContextError", "The context is full."))
    elif end < 0.32:
        steps.append(GONE)
    elif end < 0.45:
        steps.append(Done("", "length"))
    else:
        steps.append(FIGURES)
    return steps


def loading(rng: random.Random) -> list[Step]:
    """How loading may go."""
    steps: list[Step] = [Progress("", "load", 1, 2)]
    if rng.random() < 0.6:
        steps.append(HOLD)
    steps.append(Failed("", "FormatError", "It is damaged.") if rng.random() < 0.15 else Loaded("", "smollm2-135m"))
    return steps


def press(app: ChatApp, key: str) -> None:
    """Press a key and wait for nothing."""
    char = key if len(key) == 1 else None
    if char is None and "+" not in key:
        try:
            char = unicodedata.lookup(_get_unicode_name_from_key(key))
        except KeyError:
            char = None
    event = events.Key(key, char)
    event.set_sender(app)
    assert app._driver is not None
    app._driver.send_message(event)


async def act(rng: random.Random, pilot: Pilot[None], app: ChatApp, backend: FakeBackend, commands: list[str]) -> None:
    """Do one thing."""
    kind = rng.random()
    if kind < 0.35:
        press(app, rng.choice(MOVES if rng.random() < 0.6 else KEYS))
    elif kind < 0.5:
        for each in rng.choice("abc/@?1"):
            press(app, each)
    elif kind < 0.7 and len(app.screen_stack) == 1:
        text = rng.choice(commands) if rng.random() < 0.4 else rng.choice(WORDS)
        app.query_one("Prompt").restore(text, [])  # type: ignore[attr-defined]
        press(app, "enter")
    elif kind < 0.85:
        backend.release()
    elif kind < 0.9:
        await pilot.resize_terminal(*rng.choice(SIZES))
    elif kind < 0.95:
        wide, high = app.size
        with suppress(OutOfBounds, NoWidget):
            await pilot.click(offset=(rng.randrange(wide), rng.randrange(high)))
    await asyncio.sleep(rng.choice((0, 0, 0, 0.001, 0.01, 0.05)))


def belongings(folder: Path, rng: random.Random) -> Belongings:
    """What a user's chat has, in a folder of its own."""
    store = Store.open(folder / "conversations.db")
    tools = Toolbox(functions=[add], logs=folder) if rng.random() < 0.5 else None
    return Belongings(
        store=store,
        catalogue=FakeCatalogue(),
        toolbox=tools,
        presets=Presets(folder / "presets.toml"),
        approvals=Approvals(store),
        memory_bytes=16 << 30,
        ceiling_bytes=8 << 30,
        exports=folder,
    )


def play(seed: int, folder: Path, steps: int) -> None:
    """Use a chat for so many steps. Raises what has failed in it, or where it does not end."""
    rng = random.Random(seed)
    backend = FakeBackend(*(script(rng) for _ in range(steps)), loads=[loading(rng) for _ in range(8)])
    had = belongings(folder, rng)
    model = "smollm2-135m" if rng.random() < 0.9 else None
    app = ChatApp(backend, model, settings=Settings(None, samples=rng.choice((1, 1, 1, 2))), belongings=had)

    async def run() -> None:
        async with app.run_test(size=rng.choice(SIZES[:3])) as pilot:
            commands = [f"/{each.name}" for each in app.prompt_commands() if each.name != "quit"]
            commands += [
                "/samples 2",
                "/think off",
                "/title A name",
                "/export a.md",
                "/search story",
                "/speculate auto",
            ]
            for _ in range(steps):
                await act(rng, pilot, app, backend, commands)
                if app._exception is not None or app._exit:
                    break
            if rng.random() < 0.3:
                # In the middle of whatever it is.
                press(app, "ctrl+q")
                return
            for turn in range(600):
                backend.release()
                idle = app.session.state in (State.READY, State.ASLEEP, State.EMPTY) and app.waiting is None
                if app._exception is not None or (idle and len(app.screen_stack) == 1):
                    break
                if turn % 25 == 0:
                    # Seldom: who is asked for a tool's sake is not asked before no key was pressed for a while.
                    press(app, "escape")
                await asyncio.sleep(0.02)
            else:
                raise AssertionError(f"it never came to rest: {app.session.state}, {app.screen_stack}")
            await pilot.pause(0.1)

    asyncio.run(asyncio.wait_for(run(), timeout=240))
    again = Store.open(folder / "conversations.db")
    assert again.notices == []
    for each in again.list():
        again.load(each.id).tree.path()
    again.close()
