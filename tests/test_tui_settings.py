"""The panel of settings, driven in an app of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hosting import NOTHING, SIZES, Drive, Host, host, shown, until, words
from textual.pilot import Pilot
from textual.widgets import Input, Select, TextArea

from edger1.messages import Sampling
from edger1.tui.presets import Presets
from edger1.tui.screens.settings import SettingsScreen
from edger1.tui.settings import Settings

P = Pilot[None]
GIVEN = Settings("Be brief.", Sampling(temperature=0.7, top_k=20), 256, "on", 500, 20, 5, "lookup", True)


@pytest.fixture
def presets(tmp_path: Path) -> Presets:
    return Presets(tmp_path / "presets.toml")


def drive(
    presets: Presets, scenario: Drive, size: tuple[int, int] = (80, 24), given: Settings = GIVEN, **own: float
) -> None:
    host(lambda: SettingsScreen(given, presets, Sampling(**own)), scenario, size)  # type: ignore[arg-type]


def box(app: Host, name: str) -> Input:
    return app.screen.query_one(f"#{name}", Input)


async def type_into(pilot: P, app: Host, name: str, text: str) -> None:
    box(app, name).focus()
    box(app, name).value = ""
    await pilot.press(*text)
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_every_field_is_reached_by_the_keyboard_and_taken(presets: Presets, size: tuple[int, int]) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: box(app, "temperature").has_focus)
        typed = {"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "repetition_penalty": "1.1"}
        for name, text in {**typed, "seed": "7", "max_tokens": "100"}.items():
            assert box(app, name).has_focus
            # What has the focus is on the screen, however small that is.
            assert app.screen.query_one("#said").parent.region.contains_region(box(app, name).region)  # type: ignore
            await pilot.press("home", "ctrl+k", *text, "enter")
        assert app.screen.query_one("#think", Select).has_focus
        await pilot.press("tab")
        for name, text in {"think_budget": "900", "think_at_least": "90", "samples": "3"}.items():
            assert box(app, name).has_focus
            assert app.screen.query_one("#said").parent.region.contains_region(box(app, name).region)  # type: ignore
            await pilot.press("home", "ctrl+k", *text, "enter")
        assert app.screen.query_one("#speculate", Select).has_focus
        await pilot.press("tab")
        assert app.screen.query_one("#context_shift", Select).has_focus
        app.screen.query_one(TextArea).focus()
        await pilot.press("end", "enter", *"Or not.")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result is not NOTHING)
        sampling = Sampling(0.5, 0.9, 40, 0.05, 1.1, 7)
        assert app.result == Settings("Be brief.\nOr not.", sampling, 100, "on", 900, 90, 3, "lookup", True)

    drive(presets, scenario, size)


def test_the_settings_come_back_as_they_were(presets: Presets) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result == GIVEN)

    drive(presets, scenario)


def test_escape_changes_nothing(presets: Presets) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await type_into(pilot, app, "temperature", "0.1")
        await pilot.press("escape")
        await until(pilot, lambda: app.result is None)

    drive(presets, scenario)


def test_what_is_empty_is_the_models_choice_and_shows_it(presets: Presets) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        assert box(app, "temperature").placeholder == "0.6"
        assert box(app, "top_k").placeholder == "0"
        assert box(app, "seed").placeholder == "random"
        assert "0.6" in shown(app)
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result == Settings())

    drive(presets, scenario, given=Settings(), temperature=0.6)


@pytest.mark.parametrize(
    ("name", "text", "reason", "size"),
    [
        ("temperature", "hot", "a number from 0 (greedy) to 100", (60, 15)),
        ("temperature", "nan", "temperature is nan", (80, 24)),
        ("top_p", "1.5", "above 0 and up to 1", (120, 40)),
        ("top_k", "2.5", "a whole number", (80, 24)),
        ("seed", "-1", "a whole number from 0", (80, 24)),
        ("max_tokens", "0", "at least 1", (60, 15)),
        ("think_at_least", "-1", "0 or more", (60, 15)),
        ("samples", "1000", "from 1 to 64", (80, 24)),
    ],
)
def test_a_wrong_number_is_explained_as_it_is_typed_and_not_taken(
    presets: Presets, name: str, text: str, reason: str, size: tuple[int, int]
) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await type_into(pilot, app, name, text)
        await until(pilot, lambda: reason in words(app))
        await pilot.press("ctrl+s")
        await pilot.pause()
        assert app.result is NOTHING
        await type_into(pilot, app, name, "1")
        await until(pilot, lambda: reason not in words(app))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result is not NOTHING)

    drive(presets, scenario, size)


def test_a_thought_that_would_be_longer_than_it_may_is_refused(presets: Presets) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await type_into(pilot, app, "think_at_least", "600")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: "at most that" in words(app))
        assert box(app, "think_at_least").has_focus
        await type_into(pilot, app, "think_at_least", "60")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result is not NOTHING)

    drive(presets, scenario)


def test_reset_leaves_everything_to_the_model(presets: Presets) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await pilot.press("ctrl+r", "ctrl+s")
        await until(pilot, lambda: app.result == Settings())

    drive(presets, scenario)


@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_presets_are_saved_applied_and_deleted(presets: Presets, size: tuple[int, int]) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await pilot.press("ctrl+n")
        await until(pilot, lambda: "Save these settings as" in shown(app))
        await pilot.press(*"mine", "enter")
        await until(pilot, lambda: "Saved as mine." in shown(app))
        assert Presets(presets.path).get("mine") == GIVEN
        await pilot.press("ctrl+r", "ctrl+o")
        await until(pilot, lambda: "temperature 0.7" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "mine is filled in" in shown(app))
        await pilot.press("ctrl+o")
        await until(pilot, lambda: "temperature 0.7" in shown(app))
        await pilot.press("ctrl+d")
        await until(pilot, lambda: "Delete the preset mine?" in shown(app))
        await pilot.press("y")
        await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
        assert Presets(presets.path).names() == []
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result == GIVEN)

    drive(presets, scenario, size)


def test_a_preset_is_replaced_only_after_a_question(presets: Presets) -> None:
    presets.save("mine", Settings())

    async def scenario(pilot: P, app: Host) -> None:
        for answer in ("enter", "y"):
            await pilot.press("ctrl+n")
            await until(pilot, lambda: "Save these settings as" in shown(app))
            await pilot.press(*"mine", "enter")
            await until(pilot, lambda: "Replace it?" in shown(app))
            await pilot.press(answer)
            await until(pilot, lambda: isinstance(app.screen, SettingsScreen))
            await app.workers.wait_for_complete()
            assert Presets(presets.path).get("mine") == (Settings() if answer == "enter" else GIVEN)

    drive(presets, scenario)


def test_a_bad_file_of_presets_is_said(tmp_path: Path) -> None:
    file = tmp_path / "presets.toml"
    file.write_text("[mine")

    async def scenario(pilot: P, app: Host) -> None:
        await until(pilot, lambda: "is not valid TOML" in words(app))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: app.result == GIVEN)

    drive(Presets(file), scenario)


def test_the_mouse_takes_the_settings_too(presets: Presets) -> None:
    async def scenario(pilot: P, app: Host) -> None:
        await pilot.click("#take")
        await until(pilot, lambda: app.result == GIVEN)

    drive(presets, scenario, (120, 40))
