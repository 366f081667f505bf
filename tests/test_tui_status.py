"""The line of figures: what fits, in the order that it is wanted, and always at the same place."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from chatting import screen
from fake_backend import FIGURES
from textual.app import App, ComposeResult

from edger1.messages import Figures, Usage
from edger1.tui.figures import fields, fit
from edger1.tui.widgets.status import Status

DENSE = FIGURES.figures
STREAMED = dataclasses.replace(
    DENSE, experts={"decode": {"hit_rate": 0.873, "bytes_per_token": 12_400_000.0, "stall_share": 0.052}}
)


def under_ceiling(figures: Figures, held: int, ceiling: int) -> Any:
    """Figures with a ceiling."""
    found = dataclasses.replace(figures, accounted_memory_bytes=held)
    if "ceiling_bytes" in {field.name for field in dataclasses.fields(Figures)}:
        return dataclasses.replace(found, ceiling_bytes=ceiling)  # type: ignore[call-arg]
    object.__setattr__(found, "ceiling_bytes", ceiling)
    return found


def line(figures: Figures, room: int, usage: Usage | None = None, live: bool = False) -> str:
    return " · ".join(said for said, _ in fit(fields(figures, usage, live=live), room))


def test_the_most_wanted_figures_come_first_and_in_full_where_there_is_room() -> None:
    full = under_ceiling(STREAMED, 5_340_000_000, 6_000_000_000)
    assert line(full, 200, FIGURES.usage) == (
        " 48.3 tok/s · context   448 / 8,192 · experts  87% in memory · waiting   5% ·  12 MB read a token · "
        "first token 0.21 s · memory 5.3 of 6.0 GB · prompt 12 new, 340 cached"
    )
    assert line(full, 56) == " 48.3 tok/s · ctx   448/8,192 · hits  87% · waiting   5%"
    assert line(full, 12) == " 48.3 tok/s"
    assert line(full, 5) == ""


def test_what_was_not_measured_is_left_out_afterwards_and_its_place_kept_before() -> None:
    nothing = Figures(context_used=12, context_size=8192)
    assert line(nothing, 100) == "context    12 / 8,192"
    assert line(nothing, 100, live=True) == "    – tok/s · context    12 / 8,192 · first token    – s"
    resident = dataclasses.replace(
        nothing, experts={"decode": dict.fromkeys(("hit_rate", "bytes_per_token", "stall_share"))}
    )
    assert line(resident, 100) == line(nothing, 100)


@pytest.mark.parametrize("room", range(20, 130, 7))
def test_figures_do_not_move_while_their_values_change(room: int) -> None:
    shapes = set()
    for rate, used, hits, nbytes, stall in (
        (None, 9, None, None, None),
        (9.1, 448, 0.02, 4e6, 0.0),
        (48.3, 1448, 0.99, 12e6, 0.05),
        (128.3, 7100, 1.0, 999e6, 1.0),
    ):
        figures = dataclasses.replace(
            under_ceiling(DENSE, 412_000_000, 6_000_000_000),
            decode_tokens_per_s=rate,
            context_used=used,
            experts={"decode": {"hit_rate": hits, "bytes_per_token": nbytes, "stall_share": stall}},
        )
        shapes.add(tuple(len(said) for said, _ in fit(fields(figures, live=True), room)))
    assert len(shapes) == 1


@pytest.mark.parametrize(
    ("used", "words", "mood"),
    [(7_371, "context 7,371 / 8,192", ""), (7_373, "nearly full", "warning"), (8_192, "8,192 full", "error")],
)
def test_a_context_near_its_end_is_told_in_words_and_in_a_colour(used: int, words: str, mood: str) -> None:
    said, got = fit(fields(dataclasses.replace(DENSE, context_used=used)), 100)[1]
    assert words in said
    assert got == mood


def test_memory_over_the_ceiling_is_told() -> None:
    over = under_ceiling(DENSE, 6_200_000_000, 6_000_000_000)
    assert ("memory 6.2 of 6.0 GB over the ceiling", "error") in fit(fields(over), 200)
    assert "memory  99 of 900 MB" in line(under_ceiling(DENSE, 99_000_000, 900_000_000), 200)


class Host(App[None]):
    def compose(self) -> ComposeResult:
        yield Status()


@pytest.mark.parametrize("size", [(60, 15), (80, 24), (120, 40)])
def test_the_line_is_laid_out_for_the_width(size: tuple[int, int]) -> None:
    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            status = app.query_one(Status)
            status.show(under_ceiling(STREAMED, 5_340_000_000, 6_000_000_000), live=True)
            places = set()
            for state in ("Reading", "Thinking", "Writing", ""):
                status.state = state
                await pilot.pause()
                (shown,) = screen(app).strip("\n").splitlines()[:1]
                assert shown.startswith(f"  {state}")
                places.add(shown.index("tok/s"))
                assert "448" in shown
                assert "hits" in shown or "experts" in shown
            assert len(places) == 1
            status.state = "Loading a-model-with-a-name-that-no-terminal-has-the-room-for-to-show " * 3
            await pilot.pause()
            assert "…" in screen(app)
            status.show(None)
            status.state = ""
            await pilot.pause()
            assert screen(app).strip() == ""

    asyncio.run(asyncio.wait_for(run(), timeout=90))
