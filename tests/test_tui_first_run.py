"""The screen of the first run, driven with a catalogue that plays scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_catalogue import HOLD, FakeCatalogue
from hosting import NOTHING, SIZES, Drive, Host, host, shown, until, words
from textual.pilot import Pilot

from edger1.errors import UsageError
from edger1.tui.catalogue import Chosen, FetchFailed, Step
from edger1.tui.screens.first_run import FirstRunScreen
from edger1.tui.screens.models import ModelsScreen

P = Pilot[None]
FIRST = "qwen3-30b-a3b"


def new() -> list[object]:
    from fake_catalogue import ENTRIES

    return [entry for entry in ENTRIES if entry.name in ("nano-moe", FIRST, "deepseek-r1")]


def drive(catalogue: FakeCatalogue, scenario: Drive, size: tuple[int, int] = (80, 24)) -> None:
    host(lambda: FirstRunScreen(catalogue, 16 * 10**9, ceiling_bytes=12 * 10**9), scenario, size)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_it_recommends_by_memory_and_starts_with_what_was_fetched(size: tuple[int, int]) -> None:
    catalogue = FakeCatalogue(new(), scripts={FIRST: [Step("download", 340, 1000), HOLD]})  # type: ignore[arg-type]

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "recommended" in shown(app))
        text = shown(app)
        assert "This machine has 16.0 GB of memory" in text
        assert "4.60 GB · about 6 min" in text
        await pilot.press("down", "enter")
        await until(pilot, lambda: "34% of 1.00 kB" in shown(app))
        assert app.result is NOTHING
        catalogue.release()
        await until(pilot, lambda: app.result == Chosen(FIRST, Path("/models") / FIRST))

    drive(catalogue, scenario, size)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_without_a_network_it_says_what_can_be_done_and_the_packaged_model_starts(size: tuple[int, int]) -> None:
    failing = [FetchFailed("SourceError", "qwen3-8b could not be fetched: offline, so it was not asked.")]
    catalogue = FakeCatalogue(new(), scripts={"qwen3-8b": failing})  # type: ignore[arg-type]

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "recommended" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "offline, so it was not asked" in words(app))
        assert "edger1 pull" in shown(app)
        await pilot.press("down", "down", "down")
        await until(pilot, lambda: "no network needed" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: app.result == Chosen("nano-moe", Path("/models/nano-moe")))

    drive(catalogue, scenario, size)


def test_a_fetch_is_stopped_and_another_model_taken() -> None:
    catalogue = FakeCatalogue(new(), scripts={"qwen3-8b": [Step("download", 1, 10), HOLD]})  # type: ignore[arg-type]

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "recommended" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "10%" in shown(app))
        await pilot.press("ctrl+x")
        await until(pilot, lambda: "qwen3-8b is stopped. What came is kept" in shown(app))
        assert catalogue.stopped == ["qwen3-8b"]
        assert app.result is NOTHING

    drive(catalogue, scenario)


def test_a_recommended_model_that_is_here_is_not_fetched() -> None:
    catalogue = FakeCatalogue()

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "recommended" in shown(app))
        assert "4.60 GB · here already" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: app.result == Chosen("qwen3-8b", Path("/models/qwen3-8b")))
        assert catalogue.fetched == []

    drive(catalogue, scenario)


def test_a_folder_can_be_given() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "recommended" in shown(app))
        for path in ("/nowhere", "/some/model"):
            await pilot.press("end", "enter")
            await until(pilot, lambda: "The folder of a model" in shown(app))
            await pilot.press(*path.replace("/", "\0").replace("\0", "/"), "enter")
            if path == "/nowhere":
                await until(pilot, lambda: "holds no model" in shown(app))
        await until(pilot, lambda: app.result == Chosen("model", Path("/some/model")))

    drive(FakeCatalogue(), scenario)


def test_all_models_are_one_step_away() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "recommended" in shown(app))
        await pilot.press("end", "up", "enter")
        await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and "nano-moe" in shown(app))
        await pilot.press(*"nano", "enter")
        await until(pilot, lambda: app.result == Chosen("nano-moe", Path("/models/nano-moe")))

    drive(FakeCatalogue(), scenario)


def test_a_bad_registry_is_said_and_a_folder_can_still_be_given() -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "models.toml has no sources" in shown(app))
        assert "A folder" in shown(app)
        await pilot.press("escape")
        await until(pilot, lambda: app.result is None)

    drive(FakeCatalogue(error=UsageError("models.toml has no sources.")), scenario)
