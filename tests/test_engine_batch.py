"""Requests that are decoded together: the same answers as alone, whoever joins, leaves, is cancelled or fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

import edger1
from edger1 import batch, kernels
from edger1.batch import Batch
from edger1.cache import KVStore
from edger1.generate import Generation
from edger1.messages import Text

pytestmark = pytest.mark.filterwarnings("ignore:A context of")

if not kernels.state().available:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

ROOM = 20_000
"""A context whose caches have room for all requests of a test."""


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step together had."""
    counts: list[int] = []
    step = Batch.step

    def counted(self: Batch, asked: Any) -> Any:
        counts.append(len(asked))
        return step(self, asked)

    monkeypatch.setattr(Batch, "step", counted)
    return counts


def several(n: int, tokens: int = 40) -> list[tuple[str, dict[str, Any]]]:
    """Prompts of different lengths, with different ends, samplers and seeds."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3},
        {"temperature": 0, "repetition_penalty": 1.2},
        {"temperature": 1.5, "min_p": 0.05},
    ]
    return [
        (
            # No two begin alike, since how many rows pass at once decides how "fast" rounds what they would share.
            chr(65 + i) + "abc " * (1 + 7 * i % 23),
            {"raw": True, "max_tokens": tokens + 3 * (i % 4), "seed": i, **kinds[i % len(kinds)]},
        )
        for i in range(n)
    ]


def answers_of(handles: list[Any]) -> list[tuple[str, str, int]]:
    done = [handle.result(60) for handle in handles]
    return [(r.text, r.finish_reason, r.usage.completion_tokens) for r in done]


def alone(folder: Path, precision: str, asked: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, str, int]]:
    with edger1.load(folder, precision=precision, context=ROOM) as model:
        return [answers_of([model.submit(prompt, **options)])[0] for prompt, options in asked]


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_each_answer_is_the_one_it_is_alone(tiny_folder: Path, precision: str, rows: list[int]) -> None:
    asked = several(20)
    expected = alone(tiny_folder, precision, asked)
    assert rows == []
    with edger1.load(tiny_folder, precision=precision, context=ROOM) as model:
        got = answers_of([model.submit(prompt, **options) for prompt, options in asked])
    assert got == expected
    assert max(rows) == batch.MOST_ROWS


def test_stop_strings_and_ends_of_answers_are_each_ones_own(tiny_folder: Path, rows: list[int]) -> None:
    asked = several(6)
    stops = [text[5 + i : 8 + i] for i, (text, _, _) in enumerate(alone(tiny_folder, "exact", asked))]
    asked = [(prompt, {**options, "stop": [stop]}) for (prompt, options), stop in zip(asked, stops, strict=True)]
    expected = alone(tiny_folder, "exact", asked)
    assert {finish for _, finish, _ in expected} == {"stop"}
    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        assert answers_of([model.submit(prompt, **options) for prompt, options in asked]) == expected
    assert max(rows) == 6


def test_requests_join_and_leave_those_that_run(tiny_folder: Path, rows: list[int]) -> None:
    asked = several(4, tokens=60)
    expected = alone(tiny_folder, "exact", asked)
    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        long = model.submit("Tell me", raw=True, max_tokens=2000, temperature=0)
        handles = []
        for prompt, options in asked:
            # Each comes when the one before it has been answered in part.
            handles.append(model.submit(prompt, **options))
            for i, event in enumerate(model.stream("x", raw=True, max_tokens=10, temperature=0)):
                if isinstance(event, Text) and i > 3:
                    break
        assert answers_of(handles) == expected
        long.cancel()
        cut = long.result(60)
        whole = model.generate("Tell me", raw=True, max_tokens=cut.usage.completion_tokens, temperature=0)
    assert cut.finish_reason == "cancelled"
    assert whole.text.startswith(cut.text)
    assert len(set(rows)) > 2


def test_a_cancelled_request_leaves_the_others_as_they_were(tiny_folder: Path) -> None:
    asked = several(3, tokens=80)
    expected = alone(tiny_folder, "exact", asked)
    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        others = [model.submit(prompt, **options) for prompt, options in asked]
        stream = model.stream("Hello", raw=True, max_tokens=2000, temperature=0)
        seen = [event for event, _ in zip(stream, range(12), strict=False)]
        stream.close()
        assert answers_of(others) == expected
    assert any(isinstance(event, Text) for event in seen)


def test_caches_of_a_batch_are_kept_for_prompts_that_go_on(tiny_folder: Path, rows: list[int]) -> None:
    prompts = ["The first prompt is here", "And another one", "A third"]
    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        handles = [model.submit(p, raw=True, max_tokens=30, temperature=0) for p in prompts]
        said = [handle.result(60) for handle in handles]
        assert max(rows) == 3
        further = [p + r.text + "!" for p, r in zip(prompts, said, strict=True)]
        again = [model.generate(p, raw=True, max_tokens=20, temperature=0) for p in further]
    assert all(r.usage.cached_tokens >= len(p) + 28 for p, r in zip(prompts, again, strict=True))
    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        fresh = [model.generate(p, raw=True, max_tokens=20, temperature=0) for p in further]
    assert [r.text for r in again] == [r.text for r in fresh]


def test_what_does_not_fit_together_takes_turns(tiny_folder: Path, rows: list[int]) -> None:
    asked = [("x" * n, {"raw": True, "max_tokens": 100, "temperature": 0}) for n in (700, 30, 20, 240, 10)]
    expected = alone(tiny_folder, "exact", asked)
    held: list[int] = []
    together = KVStore.hold_together

    def watched(self: KVStore, tokens: Any) -> Any:
        chosen = together(self, tokens)
        held.append(self.nbytes - self._budget_bytes)
        return chosen

    with pytest.MonkeyPatch.context() as patch, edger1.load(tiny_folder, precision="exact", context=2048) as model:
        patch.setattr(KVStore, "hold_together", watched)
        assert answers_of([model.submit(prompt, **options) for prompt, options in asked]) == expected
    assert max(rows) > 1
    assert max(held) <= 0


def test_a_row_that_fails_fails_alone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    asked = several(3)
    expected = alone(tiny_folder, "exact", asked)
    say = Generation.say

    def faulty(self: Generation, token: int, *, fed: bool) -> bool:
        if self._prompt_text == "yyyyyyyyyy" and self.tokens_fed == 20:
            raise RuntimeError("broken")
        return say(self, token, fed=fed)

    monkeypatch.setattr(Generation, "say", faulty)
    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        bad = model.submit("yyyyyyyyyy", raw=True, max_tokens=90, temperature=0)
        good = [model.submit(prompt, **options) for prompt, options in asked]
        with pytest.raises(edger1.EngineError, match="broken"):
            bad.result(60)
        assert answers_of(good) == expected
    assert max(rows) == 4
    assert "broken" in capfd.readouterr().err


def test_models_that_are_no_stack_answer_one_after_the_other(tmp_path: Path, rows: list[int]) -> None:
    kinds = ["sliding_attention", "full_attention"]
    folder = write_tiny_model(tmp_path / "windowed", layer_types=kinds, sliding_window=32)
    asked = several(3)
    expected = alone(folder, "exact", asked)
    with edger1.load(folder, precision="exact", context=ROOM) as model:
        assert answers_of([model.submit(prompt, **options) for prompt, options in asked]) == expected
    assert rows == []


def test_requests_that_begin_one_after_the_other_come_together(tiny_folder: Path, rows: list[int]) -> None:
    options: dict[str, Any] = {"raw": True, "temperature": 0}
    with edger1.load(tiny_folder, precision="fast", context=ROOM) as model:
        expected = model.generate("x", max_tokens=300, **options).text
    assert rows == []
    with edger1.load(tiny_folder, precision="fast", context=ROOM) as model:
        first = model.submit("Tell me", max_tokens=2000, **options)
        events = model.stream("x", max_tokens=300, **options)
        answer = "".join(event.text for event in events if isinstance(event, Text))
        first.cancel()
        cut = first.result(60)
    with edger1.load(tiny_folder, precision="fast", context=ROOM) as model:
        whole = model.generate("Tell me", max_tokens=cut.usage.completion_tokens, **options).text
    assert answer == expected
    assert whole.startswith(cut.text)
    assert max(rows) == 2
    assert len(rows) > 200


def test_a_batch_that_fails_leaves_the_engine_alive(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("no room")

    with edger1.load(tiny_folder, precision="exact", context=ROOM) as model:
        with monkeypatch.context() as patch:
            patch.setattr(Batch, "step", broken)
            patch.setattr(Batch, "remove", broken)
            handles = [model.submit(text, raw=True, max_tokens=50, temperature=0) for text in ("one", "two")]
            failed = 0
            for handle in handles:
                try:
                    handle.result(60)
                except edger1.EngineError:
                    failed += 1
            assert failed
        assert model.generate("three", raw=True, max_tokens=5).usage.completion_tokens
    assert "no room" in capfd.readouterr().err


class Row:
    """A running request, as far as the store can see."""

    def give_way(self) -> None:
        raise AssertionError("nobody is to give way for company")


def test_the_shortest_that_fit_padded_are_chosen() -> None:
    store = KVStore(100, lambda tokens: tokens)
    a, b, c, d = (Row() for _ in range(4))
    for row, n in ((a, 40), (b, 10), (c, 12), (d, 20)):
        assert store.hold(row, n)
    assert store.hold_together({a: 40, b: 10, c: 12}) == [b, c]
    assert store.nbytes == 40 + 2 * 12 + 20
    assert store.hold_together({a: 40, d: 20}) == []
    assert store.nbytes == 40 + 2 * 12 + 20
    assert store.hold_together({b: 50, c: 12}) == []
    assert store.hold_together({b: 10, Row(): 10}) == []


def test_padding_is_given_back_and_who_waits_is_not_chosen() -> None:
    class Younger(Row):
        def give_way(self) -> None:
            pass

    store = KVStore(100, lambda tokens: tokens)
    a, b = Row(), Younger()
    assert store.hold(a, 10)
    assert store.hold(b, 40)
    assert store.hold_together({a: 10, b: 40}) == [a, b]
    assert store.nbytes == 80
    store.settle(a, 11)
    assert store.nbytes == 51
    assert store.hold(a, 90)
    assert store.hold_together({a: 90, b: 1}) == []
