"""The screen of models, driven with a catalogue that plays scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_catalogue import ADAPTERS, HOLD, FakeCatalogue
from hosting import NOTHING, SIZES, Drive, Host, host, shown, until, words
from textual.pilot import Pilot

from edger1.errors import UsageError
from edger1.tui.catalogue import Chosen, FetchFailed, Pace, Step
from edger1.tui.fetches import Fetches
from edger1.tui.screens.models import ModelsScreen

P = Pilot[None]


def drive(
    catalogue: FakeCatalogue, scenario: Drive, size: tuple[int, int] = (80, 24), current: str | None = None
) -> None:
    host(lambda: ModelsScreen(catalogue, current=current), scenario, size)


async def to(pilot: P, app: Host, name: str) -> None:
    await pilot.press("escape") if app.screen.query_one("Input").value else None  # type: ignore[attr-defined]
    await pilot.press(*name)
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_models_are_listed_with_size_and_fit_in_words(size: tuple[int, int]) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        text = shown(app)
        line = next(each for each in text.splitlines() if "qwen3-8b" in each)
        assert "4.60 GB" in line
        assert "fits" in line
        assert "On this machine" in text
        await pilot.press(*"deepseek-r1")
        await until(pilot, lambda: "too big" in shown(app))
        # Why, beside or below the list.
        assert "Needs about 32.0 GB" in words(app)

    drive(FakeCatalogue(), scenario, size)


def test_search_finds_by_letters_in_order_and_by_title() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"q30b")
        await until(pilot, lambda: "qwen3-8b" not in shown(app))
        assert "qwen3-30b-a3b" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"january")
        await until(pilot, lambda: "qwen3-8b" not in shown(app))
        assert "deepseek-r1" in shown(app)
        await pilot.press(*"zzzz")
        await until(pilot, lambda: "No model matches" in shown(app))
        await pilot.press("enter")
        assert app.result is NOTHING
        await pilot.press("escape", "escape")
        await until(pilot, lambda: app.result is None)

    drive(FakeCatalogue(), scenario)


def test_enter_chooses_an_installed_model() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: app.result is not NOTHING)
        assert app.result == Chosen("qwen3-8b", Path("/models/qwen3-8b"))

    drive(FakeCatalogue(), scenario)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_an_adapter_is_chosen_in_a_second_step(size: tuple[int, int]) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: "No adapter" in shown(app))
        assert "rank 16" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert app.result is NOTHING
        await pilot.press("enter")
        await until(pilot, lambda: "No adapter" in shown(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: app.result is not NOTHING)
        assert app.result == Chosen("qwen3-8b", Path("/models/qwen3-8b"), Path("/runs/mine/adapter"))

    drive(FakeCatalogue(adapters=ADAPTERS), scenario, size)


def test_no_adapter_is_a_choice() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press("down", "enter")
        await until(pilot, lambda: "No adapter" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.result == Chosen("qwen3-8b", Path("/models/qwen3-8b")))

    drive(FakeCatalogue(adapters=ADAPTERS), scenario)


def test_a_damaged_model_is_not_chosen_and_says_why() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "broken" in shown(app))
        assert "damaged" in next(line for line in shown(app).splitlines() if "broken" in line)
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: "cannot be used: its index names files" in words(app))
        assert app.result is NOTHING

    drive(FakeCatalogue(), scenario)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_a_model_is_fetched_and_can_then_be_chosen(size: tuple[int, int]) -> None:
    catalogue = FakeCatalogue(scripts={"qwen3-30b-a3b": [Step("download", 340, 1000), HOLD]})

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"30b", "enter")
        await until(pilot, lambda: "Licence: Apache-2.0" in shown(app))
        # What is here already, and how it would run.
        assert "1.20 GB are here already" in shown(app)
        assert "streams" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: "Downloading qwen3-30b-a3b · 34% of 1.00 kB" in shown(app))
        assert "34%" in next(line for line in shown(app).splitlines() if "17.2 GB" in line)
        catalogue.release()
        await until(pilot, lambda: "qwen3-30b-a3b is here" in shown(app))
        await until(pilot, lambda: "On this machine" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.result == Chosen("qwen3-30b-a3b", Path("/models/qwen3-30b-a3b")))

    drive(catalogue, scenario, size)


def test_a_fetch_can_be_declined() -> None:
    catalogue = FakeCatalogue()

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"30b", "enter")
        await until(pilot, lambda: "Licence" in shown(app))
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert catalogue.fetched == []

    drive(catalogue, scenario)


def test_fetches_queue_and_each_can_be_stopped() -> None:
    hold = [Step("download", 100, 1000), HOLD]
    catalogue = FakeCatalogue(scripts={"qwen3-30b-a3b": [*hold], "deepseek-r1": [*hold]})

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        for name in ("30b", "deepseek", "myst"):
            await pilot.press(*name, "enter")
            await until(pilot, lambda: "Back" in shown(app))
            await pilot.press("y")
            await until(pilot, lambda: isinstance(app.screen, ModelsScreen))
            await pilot.press("escape")
        await until(pilot, lambda: "then deepseek-r1, mystery" in words(app))
        assert catalogue.fetched == ["qwen3-30b-a3b"]
        # One that waits leaves the queue without having begun.
        await pilot.press(*"deepseek", "ctrl+x")
        await until(pilot, lambda: "deepseek-r1 is stopped" in shown(app))
        await pilot.press("escape", *"30b", "ctrl+x")
        await until(pilot, lambda: catalogue.fetched == ["qwen3-30b-a3b", "mystery"])
        assert catalogue.stopped == ["qwen3-30b-a3b"]
        await until(pilot, lambda: "mystery is here" in shown(app))

    drive(catalogue, scenario)


def test_why_a_fetch_failed_is_shown_and_it_can_be_tried_again() -> None:
    failing = [FetchFailed("SourceError", "deepseek-r1 could not be fetched: offline, so it was not asked.")]
    catalogue = FakeCatalogue(scripts={"deepseek-r1": failing})

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        for _ in range(2):
            await pilot.press(*"deepseek", "enter")
            await until(pilot, lambda: "too big for this machine" in shown(app))
            await pilot.press("enter")
            await until(pilot, lambda: "offline, so it was not asked" in shown(app))
            await pilot.press("escape")
        assert catalogue.fetched == ["deepseek-r1", "deepseek-r1"]

    drive(catalogue, scenario)


def test_deleting_asks_first_and_refuses_what_is_in_use_or_comes_along() -> None:
    catalogue = FakeCatalogue()

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"nano", "ctrl+d")
        await until(pilot, lambda: "is a part of EdgeR1" in shown(app))
        await pilot.press("escape", *"broken", "ctrl+d")
        await until(pilot, lambda: "is in use" in shown(app))
        await pilot.press("escape", *"8b", "ctrl+d")
        await until(pilot, lambda: "Delete qwen3-8b?" in shown(app))
        # Enter is no: what is gone is gone.
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen))
        assert catalogue.removed == []
        await pilot.press("ctrl+d")
        await until(pilot, lambda: "Delete qwen3-8b?" in shown(app))
        await pilot.press("y")
        await until(pilot, lambda: catalogue.removed == ["qwen3-8b"])
        await until(pilot, lambda: "is deleted, 4.60 GB freed" in shown(app))

    drive(catalogue, scenario, current="broken")


def test_markup_and_control_characters_of_a_title_are_only_text() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"myst")
        await until(pilot, lambda: "[bold]What" in shown(app))
        assert "\x1b" not in shown(app)

    drive(FakeCatalogue(), scenario, (120, 40))


def test_the_mouse_chooses_too() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        row = next(y for y, line in enumerate(shown(app).splitlines()) if "qwen3-8b" in line)
        await pilot.click(offset=(8, row))
        await until(pilot, lambda: app.result == Chosen("qwen3-8b", Path("/models/qwen3-8b")))

    drive(FakeCatalogue(), scenario)


def test_a_registry_that_cannot_be_read_is_said() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "models.toml is not valid TOML" in shown(app))
        await pilot.press("escape")
        await until(pilot, lambda: app.result is None)

    drive(FakeCatalogue(error=UsageError("models.toml is not valid TOML: line 3.")), scenario)


def test_fetches_outlive_the_screen_where_the_app_owns_them() -> None:
    catalogue = FakeCatalogue(scripts={"qwen3-30b-a3b": [Step("download", 100, 1000), HOLD]})
    fetches = Fetches(catalogue)

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "qwen3-8b" in shown(app))
        await pilot.press(*"30b", "enter")
        await until(pilot, lambda: "Licence" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "10%" in shown(app))
        await pilot.press("escape", "escape")
        await until(pilot, lambda: app.result is None)
        catalogue.release()
        await until(pilot, lambda: not fetches.open)
        fetch = fetches.of("qwen3-30b-a3b")
        assert fetch is not None
        assert (fetch.status, fetch.folder) == ("done", Path("/models/qwen3-30b-a3b"))

    host(lambda: ModelsScreen(catalogue, fetches), scenario)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    assert pace.update(Step("download", 1000, 5000), 0.0) == (None, None)
    assert pace.update(Step("download", 2000, 5000), 1.0) == (1000.0, 3.0)
    # Another stage counts something else.
    assert pace.update(Step("convert", 0, 10, "tensors"), 2.0) == (None, None)
    pace = Pace()
    for second in range(30):
        rate, left = pace.update(Step("download", second * (1 if second < 15 else 100), 0), second)
    assert rate == pytest.approx(100)
    assert left is None
