"""Requests with drafts among others: together they are decoded without drafts, alone again they draft again."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import edger1
from edger1 import kernels
from edger1.batch import Batch
from edger1.drafting.length import Length
from edger1.messages import Text
from edger1.speculate import Speculation

pytestmark = pytest.mark.filterwarnings("ignore:A context of")

if not kernels.state().available:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

ROOM = 20_000
LONG: dict[str, Any] = {"raw": True, "max_tokens": 300}
PROMPT = "abcd abcd abcd "


class Trace:
    """What steps there were, in order: "d" with drafts, "b" of several requests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = ""
        self.drafted = threading.Event()
        verify, together = Speculation.step, Batch.step

        def drafting(drafts: Speculation, *args: Any) -> Any:
            self.steps += "d"
            self.drafted.set()
            return verify(drafts, *args)

        def batched(batch: Batch[Any], rows: Any) -> Any:
            self.steps += "b" if rows else ""
            return together(batch, rows)

        monkeypatch.setattr(Speculation, "step", drafting)
        monkeypatch.setattr(Batch, "step", batched)
        # Three drafts wherever there are any, whatever they cost on the machine that runs the tests.
        monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(3, room), 2.0))


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    return Trace(monkeypatch)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 1.1, "seed": 4, "top_k": 6}, {"temperature": 0, "repetition_penalty": 1.05}],
    ids=["greedy", "seed", "penalty"],
)
def test_drafts_end_while_others_are_answered_too_and_begin_again(
    tiny_folder: Path, trace: Trace, precision: str, settings: dict[str, Any]
) -> None:
    short: dict[str, Any] = {"raw": True, "max_tokens": 25, "temperature": 0, "speculate": "lookup"}
    with edger1.load(tiny_folder, precision=precision, context=ROOM) as model:
        expected = model.generate(PROMPT, speculate="off", **LONG, **settings).text
        other = model.generate("Who is there", **(short | {"speculate": "off"})).text
    assert trace.steps == ""
    with edger1.load(tiny_folder, precision=precision, context=ROOM) as model:
        handle = model.submit(PROMPT, speculate="lookup", **LONG, **settings)
        assert trace.drafted.wait(200)
        events = model.stream("Who is there", **short)
        assert "".join(event.text for event in events if isinstance(event, Text)) == other
        found = handle.result(200)
    assert found.text == expected
    before, _, rest = trace.steps.partition("b")
    together, after = rest[: rest.rindex("b") + 1], rest[rest.rindex("b") + 1 :]
    assert "d" in before
    assert set(together) == {"b"}, "what is decoded together has no drafts"
    assert "d" in after
    assert found.figures.drafts
    assert found.figures.drafts["steps"] == before.count("d") + after.count("d")


def test_drafts_of_several_requests_leave_their_answers_as_they_are(tiny_folder: Path, trace: Trace) -> None:
    # The last one is alone for so long that there is something to look up.
    asked: list[tuple[str, dict[str, Any]]] = [
        (
            chr(65 + i) + PROMPT * (1 + i),
            {"raw": True, "max_tokens": 30 + 20 * i if i < 4 else 400, "temperature": 0.7 * ((i + 2) % 3), "seed": i},
        )
        for i in range(5)
    ]
    answers = []
    for drafts in ("off", "lookup"):
        with edger1.load(tiny_folder, precision="fast", context=ROOM) as model:
            handles = [model.submit(prompt, speculate=drafts, **options) for prompt, options in asked]
            answers.append([handle.result(200).text for handle in handles])
    assert answers[0] == answers[1]
    assert "b" in trace.steps
    assert trace.steps.rindex("d") > trace.steps.rindex("b"), "the last one is alone in the end"
