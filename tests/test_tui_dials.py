"""What is typed for thinking, samples, drafts and a full context, how it is kept, and how it is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from fake_backend import FIGURES

from edger1.errors import UsageError
from edger1.messages import Figures, Sampling
from edger1.tui import dials
from edger1.tui.figures import fields, fit, held
from edger1.tui.presets import Presets
from edger1.tui.settings import Settings, check
from edger1.tui.store import Store

FULL = Settings("Be brief.", Sampling(temperature=0.7), 256, "on", 500, 20, 5, "auto", True)


@pytest.mark.parametrize(
    ("dial", "words", "expected", "said"),
    [
        (dials.think, "off", Settings(think="off"), "Thinking: off."),
        (dials.think, " ON ", Settings(think="on"), "Thinking: on."),
        (dials.think, "2,000", Settings(think_budget=2000), "Thinking: auto, ≤ 2,000 tokens of thought."),
        (dials.budget, "500", Settings(think_budget=500), "≤ 500 tokens of thought."),
        (dials.budget, "0", Settings(think_budget=0), "≤ 0 tokens of thought."),
        (dials.budget, "200-2000", Settings(think_budget=2000, think_at_least=200), "200–2,000 tokens of thought."),
        (dials.budget, "200-", Settings(think_at_least=200), "≥ 200 tokens of thought."),
        (dials.budget, "-200", Settings(think_budget=200), "≤ 200 tokens of thought."),
        (dials.budget, "none", Settings(), "No limit of thought."),
        (dials.samples, "5", Settings(samples=5), "5 answers to each question, of which the majority decides."),
        (dials.samples, "1", Settings(), "One answer to each question."),
        (dials.speculate, "lookup", Settings(speculate="lookup"), "Drafts: lookup."),
        (
            dials.shift,
            " ON",
            Settings(context_shift=True),
            "Context shift: on. Where the context is full, the oldest turns are dropped.",
        ),
        (
            dials.shift,
            "off",
            Settings(),
            "Context shift: off. Where the context is full, nothing is dropped and the answer ends.",
        ),
    ],
)
def test_what_is_typed_is_taken_and_told(dial: dials.Dial, words: str, expected: Settings, said: str) -> None:
    settings = dial(Settings(), words)
    assert settings == expected
    assert dials.said(dial, settings) == said


def test_a_limit_of_thought_is_no_wish_to_have_none() -> None:
    assert dials.think(Settings(think="off"), "500") == Settings(think_budget=500)
    assert dials.budget(Settings(think="off"), "200-") == Settings(think_at_least=200)
    assert dials.think(Settings(think_at_least=200), "off") == Settings(think="off")


@pytest.mark.parametrize(
    ("dial", "words", "reason"),
    [
        (dials.think, "hard", "auto, on or off"),
        (dials.think, "-3", "auto, on or off"),
        (dials.budget, "much", "200-2000"),
        (dials.budget, "-", "200-2000"),
        (dials.budget, "300-200", "at most that"),
        (dials.budget, "9" * 5000, "expected tokens"),
        (dials.samples, "0", "from 1 to 64"),
        (dials.samples, "65", "from 1 to 64"),
        (dials.samples, "two", "a whole number"),
        (dials.speculate, "much", "one of off, auto, lookup, mtp, draft"),
        (dials.shift, "yes", "on or off"),
    ],
)
def test_what_is_not_understood_is_said(dial: dials.Dial, words: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        dial(Settings(), words)


@pytest.mark.parametrize(
    ("dial", "name", "expected"),
    [
        (dials.think, "think", ["on", "off", "auto"]),
        (dials.budget, "think_budget", [500, 2000, 8000, None]),
        (dials.samples, "samples", [3, 5, 9, 1]),
        (dials.speculate, "speculate", ["auto", "off"]),
        (dials.shift, "context_shift", [True, False]),
    ],
)
def test_without_words_a_dial_goes_on_to_its_next_choice(dial: dials.Dial, name: str, expected: list[object]) -> None:
    settings = Settings()
    for value in expected:
        settings = dial(settings, "")
        assert getattr(settings, name) == value
    assert settings == Settings()
    assert dials.budget(Settings(think_budget=300, think_at_least=200), "") == Settings()


# Kept


def test_settings_survive_the_store_and_a_preset(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "c.db")
    id_ = store.create(model="m", settings=FULL)
    assert store.load(id_).settings == FULL
    store.set_settings(id_, Settings())
    assert store.load(id_).settings == Settings()
    Presets(tmp_path / "presets.toml").save("full", FULL)
    assert Presets(tmp_path / "presets.toml").get("full") == FULL
    assert 'speculate = "auto"\ncontext_shift = true\n' in (tmp_path / "presets.toml").read_text()


def test_settings_of_an_older_version_are_read_and_what_is_no_use_is_left_out() -> None:
    older = {"system": "S", "sampling": {"temperature": 0.5}, "max_tokens": 9, "think": "on"}
    assert Settings.from_json(older) == Settings("S", Sampling(0.5), 9, "on")
    odd = {
        **older,
        "samples": 0,
        "think_budget": "much",
        "think_at_least": 7,
        "speculate": "wildly",
        "context_shift": 1,
        "later": 1,
    }
    assert Settings.from_json(odd) == Settings("S", Sampling(0.5), 9, "on", think_at_least=7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"think_budget": -1},
        {"think_budget": True},
        {"think_at_least": 2.5},
        {"think_budget": 3, "think_at_least": 4},
        {"samples": None},
        {"speculate": "x"},
        {"context_shift": "on"},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        check(replace(Settings(), **wrong))  # type: ignore[arg-type]


# Told


def test_what_is_not_usual_is_told_in_as_many_words_as_there_is_room_for() -> None:
    assert held(Settings("A prompt.", Sampling(temperature=1.0))) is None
    found = held(FULL)
    assert found is not None
    assert found.long == "thinking on, 20–500 tokens of thought, 5 samples, drafts auto, context shift"
    assert found.short == "think on 20–500 5× drafts shift"
    # It is told before any figure where there is little room.
    shown = [said for said, _ in fit([found, *fields(FIGURES.figures)], 52)]
    assert shown == [found.short, " 48.3 tok/s"]


def line(drafts: dict[str, object], *, live: bool = False, room: int = 400) -> str:
    figures = Figures(drafts={"steps": 3, "sources": {}, "off": "", "gain": None, **drafts})
    return " · ".join(said for said, _ in fit(fields(figures, live=live), room))


def test_the_figures_tell_what_drafts_came_to() -> None:
    assert line({"drafted": 15, "accepted": 12, "gain": 1.42}) == "drafts  80% stood,  1.4 times as fast"
    assert line({"drafted": 15, "accepted": 12, "gain": 1.42}, room=20) == "drafts  80%,  1.4×"
    assert line({"drafted": 15, "accepted": 12}) == "drafts  80% stood"
    assert line({"drafted": 0, "accepted": 0, "off": "switched off"}) == ""
    assert line({"drafted": 0, "accepted": 0, "off": "the window is full"}) == "no drafts: the window is full"
    assert line({"drafted": 0, "accepted": 0}) == ""
    widths = {
        len(line(each, live=True))
        for each in (
            {"drafted": 0, "accepted": 0},
            {"drafted": 7, "accepted": 7},
            {"drafted": 700, "accepted": 7, "gain": 0.912},
        )
    }
    assert len(widths) == 1
