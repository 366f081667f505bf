"""Answers with drafts through the public API: nano-moe with its MTP layer, with nano-dense to draft, and look-up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model
from typer.testing import CliRunner

import edger1
from edger1 import installed, speculate
from edger1.client import ThreadConnection, events, next_id
from edger1.drafting.length import Length
from edger1.errors import UsageError
from edger1.messages import Failed, Generate, Load, Loaded

DENSE = Path(__file__).parents[1] / "recipes" / "nano" / "weights" / "nano-dense"
QUESTION = "Sort these numbers: 41, 7, 23, 12."
SOURCES = ("lookup", "mtp", "draft", "auto")


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[edger1.Model, edger1.Model]]:
    """nano-moe twice: to answer plainly, and with drafts, so that neither finds the other's KV caches."""
    nano = installed.resolve("nano-moe")
    with edger1.load(nano) as plain, edger1.load(nano, draft=DENSE) as drafting:
        yield plain, drafting


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let three drafts be made in every step, whatever they cost on the machine that runs the tests."""
    monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(3, room), 2.0))


def _said(response: Any) -> tuple[str, str, str, int]:
    return response.text, response.thinking, response.finish_reason, response.usage.completion_tokens


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 1.2, "seed": 5, "top_p": 0.9, "top_k": 50},
        {"temperature": 1.0, "seed": 6, "repetition_penalty": 1.2},
        {"temperature": 0, "max_tokens": 8},
        {"temperature": 0, "max_tokens": 80, "stop": ["12"], "raw": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_greedy_answers_and_those_with_a_seed_are_those_without_drafts(
    models: tuple[edger1.Model, edger1.Model], source: str, options: dict[str, Any]
) -> None:
    plain, drafting = models
    prompt = "2, 7, 12, 2, 7, 12, 2, 7, 41, 2, 7," if options.get("raw") else QUESTION
    given = {"max_tokens": 70, **options}
    expected = plain.generate(prompt, speculate="off", **given)
    found = drafting.generate(prompt, speculate=source, **given)
    assert _said(found) == _said(expected)
    assert found.figures.drafts
    assert found.figures.drafts["drafted"] > 0
    assert expected.figures.drafts
    assert expected.figures.drafts["drafted"] == 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("source", ["mtp", "draft"])
def test_a_prompt_that_goes_on_from_an_answer_is_answered_as_without_drafts(
    models: tuple[edger1.Model, edger1.Model], source: str
) -> None:
    plain, drafting = models
    # One that no other test leaves caches of.
    prompt = f"Question: What is 13 + {len(source)}?\nAnswer:"
    answers = []
    for model, drafts in ((plain, "off"), (drafting, source)):
        first = model.generate(prompt, raw=True, temperature=0, max_tokens=20, speculate=drafts)
        longer = prompt + first.thinking + first.text + " and"
        second = model.generate(longer, raw=True, temperature=0, max_tokens=20, speculate=drafts)
        answers.append((_said(first), _said(second), second.usage.cached_tokens))
    assert answers[0] == answers[1]
    assert answers[1][2] > 14, "the first answer's caches serve the second"


@pytest.mark.usefixtures("always")
def test_the_mtp_layer_knows_a_prompt_that_was_cached(models: tuple[edger1.Model, edger1.Model]) -> None:
    _, drafting = models
    first, second = (drafting.generate("What is 17 + 26?", temperature=0, speculate="mtp") for _ in range(2))
    assert second.usage.cached_tokens > first.usage.cached_tokens
    assert first.figures.drafts
    assert second.figures.drafts
    assert second.figures.drafts["accepted"] >= 0.9 * first.figures.drafts["accepted"]


@pytest.mark.usefixtures("always")
def test_answers_side_by_side_are_those_alone(models: tuple[edger1.Model, edger1.Model]) -> None:
    plain, drafting = models
    prompts = [f"What is {a} + 25?" for a in (11, 12, 13)]
    expected = [_said(plain.generate(p, temperature=0, max_tokens=60, speculate="off")) for p in prompts]
    handles = [drafting.submit(p, temperature=0, max_tokens=60) for p in prompts]
    assert [_said(h.result(120)) for h in handles] == expected


@pytest.mark.usefixtures("always")
def test_a_cancelled_answer_keeps_what_was_said(models: tuple[edger1.Model, edger1.Model]) -> None:
    _, drafting = models
    seen = threading.Event()
    handle = drafting.submit(QUESTION, temperature=0, max_tokens=400, speculate="mtp")
    seen.wait(0.2)
    handle.cancel()
    cut = handle.result(60)
    whole = drafting.generate(QUESTION, temperature=0, max_tokens=400, speculate="mtp")
    assert (whole.thinking + whole.text).startswith((cut.thinking + cut.text).rstrip())


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("slots", ["25%", 4])
def test_streamed_experts_say_the_same_with_drafts(slots: str | int) -> None:
    """Also where those of all rows of a pass do not have slots at once."""
    nano = installed.resolve("nano-moe")
    answers = []
    for drafts in ("off", "mtp"):
        with edger1.load(nano, expert_slots=slots) as model:
            assert model.info["drafts"]["mtp"]
            answers.append(model.generate(QUESTION, temperature=0, max_tokens=40, speculate=drafts))
    assert _said(answers[0]) == _said(answers[1])
    assert answers[1].figures.drafts
    assert answers[1].figures.drafts["accepted"] > 0


def test_figures_say_what_was_drafted(models: tuple[edger1.Model, edger1.Model]) -> None:
    _, drafting = models
    for _ in range(2):
        drafts = drafting.generate(QUESTION, speculate="auto", temperature=0, max_tokens=70).figures.drafts
    assert drafts
    assert drafts["off"] == ""
    assert drafts["accepted"] <= drafts["drafted"]
    assert drafts["drafted"] == sum(each["drafted"] for each in drafts["sources"].values())


def test_a_model_with_another_vocabulary_is_refused_with_both_named(tiny_folder: Path) -> None:
    nano = installed.resolve("nano-moe")
    with pytest.raises(UsageError, match=rf"{tiny_folder.name} cannot draft for nano-moe.*2,0\d\d") as error:
        edger1.load(nano, draft=tiny_folder)
    assert "nano-moe one of" in str(error.value)
    assert f"{tiny_folder.name} one of" in str(error.value)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("own", "drafting"), [(260, 320), (320, 260)])
def test_a_draft_model_may_pad_the_same_vocabulary_to_another_width(
    tmp_path: Path, own: int, drafting: int, seed: int | None
) -> None:
    # At this temperature padding is drawn as often as any token.
    folder = write_tiny_model(tmp_path / "own", vocab_size=own)
    smaller = write_tiny_model(tmp_path / "drafting", vocab_size=drafting, seed=1)
    with edger1.load(folder, draft=smaller) as model:
        found = model.generate("Hi", speculate="draft", temperature=100, seed=seed, max_tokens=60)
        plain = model.generate("Hi", temperature=100, seed=seed, max_tokens=60)
    assert found.figures.drafts is not None
    # What is drawn without a seed may be the end.
    assert found.figures.drafts["drafted"] or found.usage.completion_tokens < 3
    assert seed is None or found.text == plain.text


def test_what_there_is_not_is_refused_and_says_what_to_do(tiny_folder: Path) -> None:
    with edger1.load(tiny_folder) as model:
        with pytest.raises(UsageError, match="without an MTP layer"):
            model.generate("Hello", speculate="mtp")
        with pytest.raises(UsageError, match="--draft"):
            model.generate("Hello", speculate="draft")
        with pytest.raises(UsageError, match="auto, off, lookup, mtp, draft"):
            model.generate("Hello", speculate="sometimes")


@pytest.mark.usefixtures("always")
def test_windows_that_went_round_end_drafting_and_say_so() -> None:
    from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

    window = RotatingKVCache(max_size=32)
    window.offset = 28
    assert speculate._untrimmable([KVCache(), window], 4) == ""
    assert "window of 32" in speculate._untrimmable([KVCache(), window], 5)
    assert "ArraysCache" in speculate._untrimmable([KVCache(), ArraysCache(2)], 1)


def test_loading_with_a_draft_model_says_so_over_the_wire(tiny_folder: Path) -> None:
    connection = ThreadConnection()
    try:
        loaded = list(events(connection, Load(next_id(), str(tiny_folder), draft=str(tiny_folder))))[-1]
        assert isinstance(loaded, Loaded)
        assert loaded.info["drafts"] == {"mtp": False, "draft": tiny_folder.name}
        request = Generate(next_id(), loaded.model, prompt="abc", max_tokens=5, speculate="never")
        failed = list(events(connection, request))[-1]
        assert isinstance(failed, Failed)
        assert failed.error == "UsageError"
    finally:
        connection.close()


def test_the_command_line_has_drafts_in_its_json_and_its_figures(tiny_folder: Path) -> None:
    from edger1.cli import app

    command = ["run", str(tiny_folder), "abcabcabcabc", "--raw", "--max-tokens", "30", "--temperature", "0"]
    done = CliRunner().invoke(app, [*command, "--draft", str(tiny_folder), "--json"])
    assert done.exit_code == 0, done.output
    drafts = json.loads(done.stdout)["drafts"]
    assert drafts.keys() >= {"drafted", "accepted", "steps", "gain", "sources", "off"}
    off = json.loads(CliRunner().invoke(app, [*command, "--speculate", "off", "--json"]).stdout)["drafts"]
    assert (off["drafted"], off["off"]) == (0, "switched off")
    wrong = CliRunner().invoke(app, [*command, "--speculate", "mtp"])
    assert wrong.exit_code != 0
