"""Pictures of the main screens in three sizes. A wanted change is accepted with pytest --snapshot-update."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from chatting import screen, until
from fake_backend import FIGURES, GONE, HOLD, FakeBackend, words
from fake_catalogue import FakeCatalogue
from textual.pilot import Pilot

from edger1.messages import Done, Figures, Loaded, Progress, Running, Sampling, Text, Thought, ToolCall
from edger1.tools import Result, Tool, Toolbox, function_tool
from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.presets import Presets
from edger1.tui.screens.models import ModelsScreen
from edger1.tui.screens.settings import SettingsScreen
from edger1.tui.settings import Settings
from edger1.tui.widgets.prompt import Prompt

SIZES = [(60, 15), (80, 24), (120, 40)]

ANSWER = """\
## Two ways

A **prime** has no divisor but 1 and itself; see `is_prime` below and \\(\\sqrt{n}\\).

```python
def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, n))
```

| n | prime |
|---|---|
| 91 | no |

1. Try divisors.
2. Or use *Miller–Rabin*.

> Quoted.
"""


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


def chat(backend: FakeBackend, theme: str | None = None) -> ChatApp:
    return ChatApp(backend, "smollm2-135m", theme=theme, clock=count(0.0, 4.2).__next__)


def ask(*keys: str) -> Callable[[Pilot[Any]], Awaitable[None]]:
    async def run(pilot: Pilot[Any]) -> None:
        pilot.app.query_one(Prompt).insert("Is 91 prime?")
        await pilot.press("enter")
        await pilot.app.workers.wait_for_complete()
        await pilot.press(*keys)
        await pilot.pause()

    return run


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_loading(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    backend = FakeBackend(loads=[[Progress("", "load", 40_000_000, 98_000_000), HOLD, Loaded("", "m")]])
    assert snap_compare(chat(backend), terminal_size=size)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_answer(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    backend = FakeBackend([*words("91 is 7 times 13.", Thought), *words(ANSWER), FIGURES])
    assert snap_compare(chat(backend), terminal_size=size, run_before=ask("ctrl+t"))


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_dead_engine(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    backend = FakeBackend([*words("It is not, since"), GONE])
    assert snap_compare(chat(backend), terminal_size=size, run_before=ask())


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_help(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    assert snap_compare(chat(FakeBackend()), terminal_size=size, run_before=ask("f1"))


def test_light(snap_compare: Callable[..., bool]) -> None:
    backend = FakeBackend([*words("91 is 7 times 13.", Thought), *words(ANSWER), FIGURES])
    assert snap_compare(chat(backend, "edger1-light"), terminal_size=(80, 40), run_before=ask("ctrl+t"))


class Yes:
    """Allows every call."""

    def forget_conversation(self) -> None:
        """There is nothing to forget."""

    def changed(self, tool: object) -> bool:
        """Return False: there is nothing that could have changed."""
        return False

    async def approve(self, call: object, tool: object, ask: object) -> bool:
        """Return True."""
        return True


class Timed(Toolbox):
    """Tools that all take as long."""

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        """Call a tool."""
        return replace(await super().call(name, arguments, tool=tool), seconds=0.4)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_whole(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    """A second try that thought and called a tool, and what is going on while it answers."""

    def divisor(n: int) -> int:
        """Find the smallest divisor."""
        return 7

    streamed = {"decode": {"hit_rate": 0.91, "bytes_per_token": 2.1e7, "stall_share": 0.12}, "experts": [64] * 4}
    running = Figures(decode_tokens_per_s=12.4, context_used=212, context_size=4096, experts=streamed)
    calling = [*words("A tool can tell.", Thought), ToolCall("", "divisor", {"n": 91}, "c1"), Done("", "tools")]
    backend = FakeBackend(
        [Text("", "I do not know."), FIGURES],
        calling,
        [*words("**No**: 91 = 7 × 13."), Running("r", running), HOLD, FIGURES],
    )
    own = Belongings(toolbox=Timed(functions=[function_tool(divisor)]), approvals=Yes())  # type: ignore[arg-type]
    app = ChatApp(backend, "qwen3-30b-a3b", belongings=own, clock=count(0.0, 4.2).__next__)

    async def run(pilot: Pilot[Any]) -> None:
        await ask()(pilot)
        app.session.talk.title = "Is 91 prime?"
        await pilot.press("f7")
        await until(pilot, lambda: "12.4 tok/s" in screen(app) and "91 = 7" in screen(app) and "done" in screen(app))

    assert snap_compare(app, terminal_size=size, run_before=run)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_models(snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    app = chat(FakeBackend())

    async def run(pilot: Pilot[Any]) -> None:
        await app.workers.wait_for_complete()
        app.push_screen(ModelsScreen(FakeCatalogue(), current="qwen3-8b"))
        await pilot.pause()
        await app.workers.wait_for_complete()
        await pilot.press("down")
        await pilot.pause(0.3)

    assert snap_compare(app, terminal_size=size, run_before=run)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_settings(snap_compare: Callable[..., bool], size: tuple[int, int], tmp_path: Path) -> None:
    app = chat(FakeBackend())

    async def run(pilot: Pilot[Any]) -> None:
        await app.workers.wait_for_complete()
        chosen = Settings("Answer briefly.", Sampling(temperature=0.6), 2048)
        app.push_screen(SettingsScreen(chosen, Presets(tmp_path / "presets.toml"), Sampling(top_p=0.95)))
        await pilot.pause(0.3)

    assert snap_compare(app, terminal_size=size, run_before=run)
