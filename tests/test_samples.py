"""Several samples of an answer: each the one that its seed has alone, decoded together, and the vote on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import edger1
from edger1.batch import Batch
from edger1.errors import UsageError
from edger1.generate import Generation
from edger1.messages import Done, Progress, Sampled, Text, ToolCall, decode, encode
from edger1.samples import _Said, count

pytestmark = pytest.mark.filterwarnings("ignore:A context of")

DENSE = Path(__file__).parents[1] / "recipes" / "nano" / "weights" / "nano-dense"
QUESTION = "What is 13 + 29, and is it more than 40?"
ROOM = 20_000


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step together had."""
    counts: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, asked: counts.append(len(asked)) or step(self, asked))
    return counts


@pytest.fixture
def model() -> Iterator[edger1.Model]:
    with edger1.load(DENSE, context=ROOM, precision="exact") as loaded:
        yield loaded


def sample(answer: str, finish: str = "stop", calls: tuple[ToolCall, ...] = ()) -> _Said:
    done = None if finish == "none" else Done("g", finish)
    return _Said([*([Text("g", answer)] if answer else []), *calls], done)


@pytest.mark.parametrize(
    ("said", "votes", "chosen"),
    [
        # Numbers count as numbers, what stands around an answer does not count.
        (["7", "So 5 + 3.\nThe answer is 8.", r"It is \boxed{8.0}", "**8**"], {"8": 3, "7": 1}, 1),
        (["Paris.", "paris", "Rome"], {"Paris": 2, "Rome": 1}, 0),
        # What came first wins where votes are even.
        (["2", "1", "1", "2", "3"], {"2": 2, "1": 2, "3": 1}, 0),
        (["", "4"], {"4": 1}, 1),
        (["", ""], {}, 0),
        (["a"], {"a": 1}, 0),
    ],
)
def test_what_most_come_to_wins(said: list[str], votes: dict[str, int], chosen: int) -> None:
    found, winner = count([sample(text) for text in said])
    assert (found, winner) == (votes, chosen)
    assert list(found) == list(votes)


def test_what_was_cut_off_votes_only_where_nothing_else_can() -> None:
    cut = [sample("1", "length"), sample("1", "length"), sample("2")]
    assert count(cut) == ({"2": 1}, 2)
    assert count(cut[:2]) == ({"1": 2}, 0)
    # One whose thought was cut has come to nothing.
    assert count([sample("", "length"), sample("")]) == ({}, 1)


def test_calls_vote_too() -> None:
    calls = [(ToolCall("g", "add", {"a": n}, str(i)),) for i, n in enumerate([1, 2, 2])]
    votes, chosen = count([sample("", "tools", each) for each in calls])
    assert (list(votes.values()), chosen) == ([2, 1], 1)


OPTIONS: dict[str, Any] = {"temperature": 2.0, "seed": 40, "max_tokens": 90}


def test_each_sample_is_the_answer_of_its_own_seed(model: edger1.Model, rows: list[int]) -> None:
    alone = [model.generate(QUESTION, **{**OPTIONS, "seed": 40 + i}) for i in range(6)]
    assert rows == []
    with edger1.load(DENSE, context=ROOM, precision="exact") as fresh:
        found = fresh.generate(QUESTION, samples=6, **OPTIONS)
    assert found.samples == tuple(each.text for each in alone)
    assert len(set(found.samples)) > 1
    assert max(rows) == 6
    whole = [each for each in alone if each.finish_reason == "stop"]
    assert sum(found.votes.values()) == len([each for each in whole if each.text])
    assert (found.text, found.thinking) in [(each.text, each.thinking) for each in whole]
    assert found.usage.completion_tokens == sum(each.usage.completion_tokens for each in alone)
    assert found.usage.thought_tokens == sum(each.usage.thought_tokens for each in alone)
    # Those after the first begin with copies of its KV cache, and feed the prompt's last token.
    assert found.usage.prefilled_tokens == found.usage.prompt_tokens + 5


def test_samples_have_their_bounds_of_thought(model: edger1.Model) -> None:
    options = {**OPTIONS, "think_budget": 7}
    alone = [model.generate(QUESTION, **{**options, "seed": 40 + i}) for i in range(4)]
    found = model.generate(QUESTION, samples=4, **options)
    assert found.samples == tuple(each.text for each in alone)
    assert found.usage.thought_tokens <= 4 * 7


def test_a_stream_tells_the_votes_and_then_the_answer(model: edger1.Model) -> None:
    events = [
        e for e in model.stream(QUESTION, samples=3, **OPTIONS) if isinstance(e, Progress | Sampled | Text | Done)
    ]
    kinds = [type(event) for event in events if not isinstance(event, Progress)]
    assert kinds == [Sampled, Sampled, Sampled, Text, Done]
    told = [event for event in events if isinstance(event, Sampled)]
    assert [(each.done, each.total) for each in told] == [(1, 3), (2, 3), (3, 3)]
    done = events[-1]
    assert isinstance(done, Done)
    assert done.votes == told[-1].votes
    assert decode(encode(done)) == done
    assert decode(encode(told[0])) == told[0]


def test_at_temperature_0_one_sample_is_drawn(model: edger1.Model) -> None:
    plain = model.generate(QUESTION, temperature=0, max_tokens=90)
    found = model.generate(QUESTION, samples=5, temperature=0, max_tokens=90)
    assert (found.text, found.samples) == (plain.text, (plain.text,))
    assert sum(found.votes.values()) == 1
    assert "all samples are the same" in found.notes[-1]


def test_cancelling_ends_all_samples(model: edger1.Model) -> None:
    handle = model.submit("Tell me", raw=True, samples=4, temperature=1.0, max_tokens=ROOM - 100)
    handle.cancel()
    found = handle.result(60)
    assert found.finish_reason == "cancelled"
    assert len(found.samples) == 4
    assert model.generate(QUESTION, temperature=0, max_tokens=5).usage.completion_tokens == 5


@pytest.mark.parametrize("which", [0, 2])
def test_a_sample_that_fails_ends_all(
    model: edger1.Model, which: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    add = Generation._add

    def faulty(self: Generation, token: int) -> None:
        if self._request.sampling.seed == 40 + which and len(self._said.tokens) == 9:
            raise RuntimeError("broken")
        add(self, token)

    with monkeypatch.context() as patch:
        patch.setattr(Generation, "_add", faulty)
        with pytest.raises(edger1.EngineError, match="broken"):
            model.generate(QUESTION, samples=4, **OPTIONS)
    capfd.readouterr()
    assert model.generate(QUESTION, samples=2, **OPTIONS).votes is not None


def test_a_chat_takes_the_winner_for_its_turn(model: edger1.Model) -> None:
    chat = model.chat()
    first = chat.send(QUESTION, samples=3, **OPTIONS)
    assert chat.messages[-1]["content"] == first.text


def test_run_prints_the_votes_and_has_them_in_json() -> None:
    from edger1.cli import app

    asked = [
        "run",
        str(DENSE),
        QUESTION,
        "--samples",
        "3",
        "--temperature",
        "1.2",
        "--seed",
        "40",
        "--max-tokens",
        "90",
    ]
    done = CliRunner().invoke(app, [*asked, "--context", "4000"])
    assert done.exit_code == 0
    assert "3 samples · " in done.stderr
    said = json.loads(CliRunner().invoke(app, [*asked, "--json", "--think-budget", "5"]).stdout)
    assert len(said["samples"]) == 3
    assert sum(said["votes"].values()) <= 3
    assert 0 < said["thought_tokens"] <= 15
    refused = CliRunner().invoke(app, [*asked, "--think-budget", "5", "--think-at-least", "9"])
    assert isinstance(refused.exception, UsageError)
