"""What the engine does, as a user sees it: charts, the map of layers, and a cell in words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from chatting import screen, until
from test_tui_engine_history import Live
from textual.app import App
from textual.color import Color
from textual.pilot import Pilot
from textual.screen import Screen

from edger1.messages import Figures
from edger1.tui.contrast import MINIMUM, ratio
from edger1.tui.engine_history import History
from edger1.tui.screens import engine
from edger1.tui.screens.engine import DENSE, NOTHING_YET, EngineScreen
from edger1.tui.themes import COLOURLESS, THEMES
from edger1.tui.widgets.chart import bars, columns
from edger1.tui.widgets.heat_map import HeatMap

SIZES = [(60, 15), (80, 24), (120, 40)]
LAYERS, EXPERTS = 24, 64


@pytest.fixture(autouse=True)
def _redrawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "REDRAW_S", 0.0)


Scenario = Callable[[Pilot[Any], App[None], History], Awaitable[None]]


def live(step: int) -> Live:
    """A second's figures, but the first, which open the account and share a bucket with the second.

    Layer 1 never misses, layer 2 misses 3 of 10 from the 20th step on, the others 9 of 10.
    """
    figures = Figures(
        decode_tokens_per_s=10.0 + step % 7,
        accounted_memory_bytes=5_100_000_000,
        context_used=448 + step,
        context_size=8192,
        experts={
            "decode": {"stall_s": 0.1 * step, "compute_s": 0.3 * step, "bytes_read": step},
            "experts": [EXPERTS] * LAYERS,
        },
    )
    layers = []
    for row in range(LAYERS):
        misses = 0 if row == 0 else (3 if step >= 20 else 0) if row == 1 else 9
        uses = {row: 50, row + 1: 20, 40: 1}
        layers.append({"layer": row + 1, "hits": 10 - misses, "misses": misses, "experts": uses})
    return Live("a", figures, layers)


def history(steps: int) -> History:
    found = History()
    for step in range(steps):
        found.add(live(step), at=1000.0 + step)
    return found


def drive(
    scenario: Scenario,
    size: tuple[int, int] = (80, 24),
    steps: int = 40,
    theme: str = "edger1-dark",
    plain: bool = False,
) -> None:
    app = App[None](ansi_color=True if theme == COLOURLESS.name else None)
    for each in (*THEMES, COLOURLESS):
        app.register_theme(each)
    app.theme = theme
    found = history(steps)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await app.push_screen(EngineScreen(found, "qwen3-30b-a3b", plain=plain))
            await pilot.pause()
            await scenario(pilot, app, found)

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def row(app: App[Any], label: int) -> str:
    """The cells of a layer as they are shown."""
    (found,) = [line for line in screen(app).splitlines() if line.startswith(f" {label:>3} ")]
    return found[5:]


@pytest.mark.parametrize("size", SIZES)
def test_charts_and_map_are_there_at_every_size(size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        shown = screen(app)
        assert "qwen3-30b-a3b · 24 layers of 64 experts" in shown
        assert "14.0, most 16.0" in shown
        assert "5.1 GB of" not in shown
        assert "waiting" in shown
        assert "25% of the time" in shown
        assert "layer 1: 10 hits (100%), 0 misses" in shown
        assert "Back" in shown
        assert set(row(app, 1).strip()) == {"·", "+"}
        wide = 2 if size[0] > 84 else 1
        assert row(app, 2).rstrip() == "·" * 19 * wide + "▓" * 20 * wide
        assert set(row(app, 3).strip()) == {"█"}

    drive(scenario, size)


def test_arrows_and_mouse_choose_a_cell_that_is_told_in_words() -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        await pilot.press("down", "left")
        clock = time.strftime("%H:%M:%S", time.localtime(1038.0))
        assert f"{clock} to {clock}, layer 2: 7 hits (70%), 3 misses" in screen(app)
        await pilot.press("home")
        assert "layer 2: 20 hits (100%), 0 misses" in screen(app)
        assert await pilot.click(HeatMap, offset=(4 + 2 * 3, 4))
        assert "layer 5: 1 hits (10%), 9 misses" in screen(app)
        assert app.screen.query_one(HeatMap).column == 6
        await pilot.press(*["pagedown"] * 4)
        assert "layer 24: " in screen(app)
        assert "  24 " in screen(app)
        await pilot.press("end", "up")
        assert "layer 23: " in screen(app)

    drive(scenario)


def test_the_other_view_ranks_experts() -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        await pilot.press("tab")
        assert "the most used first" in screen(app)
        assert row(app, 2).rstrip() == "██▒▒··"
        await pilot.press("down", "right")
        assert "layer 2: expert 2 used 800 times (28.2%), rank 2 of 3" in screen(app)
        await pilot.press("v")
        assert "time across" in screen(app)

    drive(scenario)


def test_it_follows_while_in_sight_and_catches_up_after() -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        found.add(live(41), at=1041.0)
        await until(pilot, lambda: len(row(app, 3).strip()) == 40)
        await app.push_screen(Screen[None]())
        below = app.screen_stack[-2]
        before = below.query_one(HeatMap)._map.columns
        found.add(live(42), at=1042.0)
        await pilot.pause(0.2)
        assert below.query_one(HeatMap)._map.columns == before
        app.pop_screen()
        await until(pilot, lambda: len(row(app, 3).strip()) == 41)
        await pilot.press("escape")
        assert len(app.screen_stack) == 1
        assert found._watchers == []

    drive(scenario)


def test_a_cell_that_was_chosen_stays_chosen_while_more_comes() -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        await pilot.press("left", "left")
        heat = app.screen.query_one(HeatMap)
        chosen = heat.column
        found.add(live(41), at=1041.0)
        await until(pilot, lambda: heat._map.columns == len(found.buckets))
        assert heat.column == chosen
        await pilot.press("end")
        found.add(live(42), at=1042.0)
        await until(pilot, lambda: heat._map.columns == len(found.buckets))
        assert heat.column == len(found.buckets) - 1

    drive(scenario)


def test_nothing_yet_and_a_dense_model_are_told() -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        assert NOTHING_YET[:40] in screen(app)
        await pilot.press("tab", "down", "home", "end")
        found.add(Live("a", Figures(decode_tokens_per_s=30.0, peak_memory_bytes=412_000_000)), at=0.0)
        found.add(Live("a", Figures(decode_tokens_per_s=30.0, peak_memory_bytes=412_000_000)), at=1.0)
        await until(pilot, lambda: "30.0" in screen(app))
        assert DENSE[:40] in screen(app)
        assert "30.0, most 30.0" in screen(app)
        assert "412 MB" in screen(app)
        assert "hits" not in screen(app)

    drive(scenario, steps=0)


@pytest.mark.parametrize("theme", [*(theme.name for theme in THEMES), COLOURLESS.name])
def test_levels_are_told_by_characters_and_by_colours(theme: str) -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        heat = app.screen.query_one(HeatMap)
        heat.action_move(9, 0)
        cold = {part.style for part in heat.render_line(0) if part.text.startswith("·")}
        hot = {part.style for part in heat.render_line(2) if part.text.startswith("█")}
        (chosen,) = [part for part in heat.render_line(9) if part.style and part.style.bold]
        assert chosen.text == "+"
        labels = next(iter(heat.render_line(1))).style
        assert labels is not None
        if theme != COLOURLESS.name:
            assert labels.color is not None
            assert ratio(Color.from_rich_color(labels.color), Color.from_rich_color(labels.bgcolor)) >= MINIMUM
        assert (cold == hot) is (theme == COLOURLESS.name)

    drive(scenario, theme=theme)


def test_plain_uses_words_and_digits_alone() -> None:
    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        shown = screen(app)
        assert "hits: 16% in memory" in shown
        assert row(app, 2).rstrip() == "0" * 19 + "3" * 20
        assert not set(shown) & set("▁▂▃▄▅▆▇█░▒▓╭│─")

    drive(scenario, plain=True)


def test_new_figures_are_drawn_together_and_nothing_runs_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "REDRAW_S", 0.3)

    async def scenario(pilot: Pilot[Any], app: App[None], found: History) -> None:
        drawn = []
        shown = app.screen
        assert isinstance(shown, EngineScreen)
        await until(pilot, lambda: shown._soon is None)
        monkeypatch.setattr(EngineScreen, "_show", lambda screen: drawn.append(1))
        for step in range(40):
            found.add(live(step + 40), at=2000.0 + step)
        await until(pilot, lambda: drawn)
        assert shown._soon is None
        await asyncio.sleep(0.5)
        assert len(drawn) == 1

    drive(scenario, (120, 40))


def test_bars_have_a_fixed_scale() -> None:
    assert bars([0.0, 0.001, 0.5, 1.0, None, 7.0], 1.0, 1) == [" ▁▄█ █"]
    assert bars([1.0, 0.75, 0.25], 1.0, 2) == ["█▄ ", "██▄"]
    assert bars([1.0], 0.0, 1) == [" "]
    assert columns([1.0, 3.0, None, None, 5.0, None], 3) == [2.0, None, 5.0]
    assert columns([1.0, None], 5) == [1.0, None]
