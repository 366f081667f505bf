"""Pictures of the main screens in three sizes. A wanted change is accepted with pytest --snapshot-update."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest
from fake_backend import FIGURES, GONE, HOLD, FakeBackend, words
from textual.pilot import Pilot

from edger1.messages import Loaded, Progress, Thought
from edger1.tui.app import ChatApp
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
