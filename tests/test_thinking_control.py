"""Budgets of thought and thoughts that go on: of each family, with drafts, in batches, and with bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from reciting import recite
from tiny import write_tiny_model

import edger1
from edger1 import installed, loader
from edger1.batch import Batch
from edger1.drafting.length import Length
from edger1.errors import ContextError, UsageError
from edger1.thinking import HARMONY, SOLUTION, Markers

pytestmark = pytest.mark.filterwarnings("ignore:A context of")

DENSE = Path(__file__).parents[1] / "recipes" / "nano" / "weights" / "nano-dense"
ONE_TOKEN = Markers("<think>", "</think>")
SPLIT = Markers("((", "))!", blank="", gap="\n")
FAMILIES = {"one token": ONE_TOKEN, "split": SPLIT, "harmony": HARMONY, "solution": SOLUTION}
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OWN_WORDS = 10
"""Tokens of thought after which the reciting models want to answer."""


def reply(markers: Markers, said: str, words: int) -> str:
    """Return what a model goes on with after it `said` something: a thought of so many letters, then Yes."""
    if not said.startswith(markers.start):
        return markers.start.removeprefix(said) if markers.start.startswith(said) else markers.start
    thought, closed, answer = said.removeprefix(markers.start).lstrip("\n").partition(markers.end)
    if not closed:
        begun = next((n for n in range(len(markers.end) - 1, 0, -1) if thought.endswith(markers.end[:n])), 0)
        if begun or len(thought) >= words:
            return markers.end[begun:]
        return "abc def. "[len(thought) % 9]
    whole = markers.again + markers.answer + markers.gap + "Yes" + markers.answer_end
    return whole.removeprefix(answer) if whole.startswith(answer) and whole != answer else ""


@pytest.fixture(scope="module", params=FAMILIES)
def markers(request: pytest.FixtureRequest) -> Markers:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, markers: Markers) -> Iterator[edger1.Model]:
    """A model that thinks for OWN_WORDS letters and then says Yes."""

    def recital(tokenizer: Any, tokens: list[int]) -> int:
        said = str(tokenizer.decode(tokens, skip_special_tokens=False)).rpartition("[assistant]")[2]
        following = reply(markers, said, OWN_WORDS)
        return int(tokenizer.encode(following, add_special_tokens=False)[0] if following else tokenizer.eos_token_id)

    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "reciting", template=TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "thinking_markers", lambda path, tokenizer: markers)
        recite(patch, recital)
        loaded = edger1.load(folder)
    with loaded:
        yield loaded


def tokens(response: Any) -> int:
    return int(response.usage.prompt_tokens + response.usage.completion_tokens)


def test_it_thinks_as_it_likes_without_control(model: edger1.Model) -> None:
    found = model.generate("Hi")
    assert (found.thinking, found.text, found.finish_reason) == ("abc def. a", "Yes", "stop")
    assert found.usage.thought_tokens == OWN_WORDS
    assert found.notes == ()


@pytest.mark.parametrize("speculate", ["off", "lookup"])
@pytest.mark.parametrize("budget", [0, 1, 4, 9])
def test_a_thought_has_exactly_its_budget(
    model: edger1.Model, markers: Markers, budget: int, speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(3, room), 2.0))
    found = model.generate("Hi", think_budget=budget, speculate=speculate)
    thought = "abc def. a"[:budget]
    assert found.thinking.rstrip("\n") == thought.rstrip("\n")
    assert (found.text, found.finish_reason) == ("Yes", "stop")
    assert found.usage.thought_tokens == budget
    cut = f"The thought was closed after {budget} tokens, its budget."
    assert found.notes == ((cut,) if budget else ())


@pytest.mark.parametrize("budget", [10, 11])
def test_a_budget_that_is_not_reached_changes_nothing(model: edger1.Model, budget: int) -> None:
    expected, found = model.generate("Hi"), model.generate("Hi", think_budget=budget)
    assert (found.thinking.strip(), found.text) == (expected.thinking, expected.text)
    assert found.usage.thought_tokens == OWN_WORDS


@pytest.mark.parametrize("speculate", ["off", "lookup"])
@pytest.mark.parametrize("least", [10, 11, 30])
def test_a_thought_goes_on_until_it_is_long_enough(
    model: edger1.Model, markers: Markers, least: int, speculate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(3, room), 2.0))
    found = model.generate("Hi", think_at_least=least, speculate=speculate)
    # It wants to end after each Wait again.
    waits = 0 if least <= OWN_WORDS else -(-(least - OWN_WORDS) // len("\nWait"))
    assert found.thinking == "abc def. a" + "\nWait" * waits
    assert (found.text, found.finish_reason) == ("Yes", "stop")
    assert found.usage.thought_tokens == OWN_WORDS + 5 * waits
    blank = len(markers.blank)
    assert tokens(found) == tokens(model.generate("Hi")) + 5 * waits + blank
    assert bool(found.notes) == bool(waits)


def test_both_bounds_make_a_thought_of_exactly_so_many_tokens(model: edger1.Model) -> None:
    found = model.generate("Hi", think_at_least=13, think_budget=13)
    assert found.thinking.rstrip("\n") == "abc def. a\nWa"
    assert (found.text, found.usage.thought_tokens) == ("Yes", 13)


def test_what_was_put_there_is_in_the_caches_of_the_next_turn(model: edger1.Model, markers: Markers) -> None:
    for options in ({"think_budget": 3}, {"think_at_least": 14}):
        whole = model.generate("Hi there", **options)
        # All but the last letter of Yes, what marks its end, and the end of the answer.
        cut = whole.usage.completion_tokens - 2 - len(markers.answer_end)
        first = model.generate("Hi there", **options, max_tokens=cut)
        half = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Ye"}]
        half[1]["thought"] = first.thinking
        again = model.generate(half, continue_last=True)
        assert (first.text, again.text) == ("Ye", "s")
        assert again.usage.cached_tokens == tokens(first) - 1


def test_a_thought_that_is_gone_on_with_counts_from_its_beginning(model: edger1.Model, markers: Markers) -> None:
    half = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "thought": "abc"}]
    found = model.generate(half, continue_last=True, think_budget=8)
    # The blank is of the prompt, and of its thought.
    blanks = len(markers.blank)
    assert found.usage.thought_tokens == 8 - 3 - blanks
    assert found.text == "Yes"


@pytest.mark.parametrize("options", [{"max_tokens": 5}, {"max_tokens": 8, "think_at_least": 4}])
def test_no_room_in_the_middle_of_a_thought(model: edger1.Model, markers: Markers, options: dict[str, Any]) -> None:
    opening = len(markers.start) if markers is not ONE_TOKEN and "think_at_least" not in options else 0
    found = model.generate("Hi", **{**options, "max_tokens": options["max_tokens"] + opening})
    assert (found.text, found.finish_reason) == ("", "length")
    assert "in the middle of the thought" in found.notes[-1]


@pytest.mark.parametrize("room", [2, 3])
def test_no_room_for_the_end_of_a_thought_that_was_closed_at_its_first_token(tiny_folder: Path, room: int) -> None:
    with edger1.load(tiny_folder) as model:
        found = model.generate("Hi<think>", raw=True, think_budget=1, max_tokens=room, temperature=0)
    assert (found.finish_reason, found.usage.thought_tokens, found.usage.completion_tokens) == ("length", 1, room)
    assert found.figures.decode_tokens_per_s is None


def test_a_budget_above_the_context_is_capped_and_says_so(model: edger1.Model) -> None:
    found = model.generate("Hi", think_budget=100_000)
    assert (found.thinking, found.text) == ("abc def. a", "Yes")
    assert "The think budget of 100000 tokens leaves no room" in found.notes[0]
    short = model.generate("Hi", think_budget=8, max_tokens=8)
    assert "was taken as 6" in short.notes[0]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"think_budget": -1}, "think_budget is -1"),
        ({"think_budget": 1.5}, "think_budget is 1.5"),
        ({"think_budget": True}, "think_budget is True"),
        ({"think_at_least": -3}, "think_at_least is -3"),
        ({"think_at_least": 9, "think_budget": 8}, "more than the think_budget of 8"),
        ({"think_at_least": 9, "think": "off"}, "think is off and think_at_least is 9"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": 100_000}, "samples is 100000"),
    ],
)
def test_bounds_that_are_none_are_refused(tiny_folder: Path, options: dict[str, Any], why: str) -> None:
    with edger1.load(tiny_folder) as model, pytest.raises(UsageError, match=why):
        model.generate("Hi", **options)


def test_a_thought_longer_than_the_answer_is_refused(tiny_folder: Path) -> None:
    with edger1.load(tiny_folder) as model, pytest.raises(ContextError, match="think_at_least is 20, and the answer"):
        model.generate("Hi", think_at_least=20, max_tokens=10)


def test_an_unknown_family_answers_and_says_so_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "thinking_markers", lambda path, tokenizer: None)
    with edger1.load(tiny_folder) as model:
        plain = model.generate("Hi", max_tokens=10, temperature=0)
        found = model.generate("Hi", max_tokens=10, temperature=0, think_budget=3, think_at_least=2)
    assert found.text == plain.text
    assert len(found.notes) == 1
    assert "does not think between markers" in found.notes[0]
    assert plain.notes == ()


def said(response: Any) -> tuple[str, str, str, int, int]:
    usage = response.usage
    text, thought = response.text, response.thinking
    return text, thought, response.finish_reason, usage.completion_tokens, usage.thought_tokens


BOUNDS: list[dict[str, Any]] = [
    {"temperature": 0, "think_budget": 5},
    {"temperature": 1.0, "seed": 3, "think_budget": 12},
    {"temperature": 1.0, "seed": 4, "think_at_least": 60},
    {"temperature": 0.8, "seed": 5, "top_p": 0.9, "think_at_least": 40, "think_budget": 45},
    {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.2, "think_at_least": 50},
    {"temperature": 1.0, "seed": 7},
]
QUESTION = "Sort these numbers: 41, 7, 23, 12."


@pytest.mark.parametrize("end", ["</think>", ", 12"])
def test_drafts_change_nothing(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(3, room), 2.0))
    # Of one token, and of several, some of which are fed before the last is known.
    monkeypatch.setattr(loader, "thinking_markers", lambda path, tokenizer: Markers("<think>", end))
    nano = installed.resolve("nano-moe")
    with edger1.load(nano) as plain, edger1.load(nano, draft=DENSE) as drafting:
        for bounds in BOUNDS:
            expected = plain.generate(QUESTION, max_tokens=120, **bounds)
            for source in ("lookup", "mtp", "draft"):
                found = drafting.generate(QUESTION, max_tokens=120, speculate=source, **bounds)
                assert said(found) == said(expected)


@pytest.mark.parametrize("context", [20_000, 800])
def test_requests_of_other_bounds_are_answered_as_alone(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self, asked: rows.append(len(asked)) or step(self, asked))
    asked = [(f"{QUESTION} {i}", {"max_tokens": 150 - 7 * i, **bounds}) for i, bounds in enumerate(BOUNDS)]
    with edger1.load(DENSE, context=context, precision="exact") as model:
        expected = [said(model.generate(prompt, **options)) for prompt, options in asked]
    assert rows == []
    with edger1.load(DENSE, context=context, precision="exact") as model:
        handles = [model.submit(prompt, **options) for prompt, options in asked]
        assert [said(handle.result(120)) for handle in handles] == expected
    assert max(rows) >= (4 if context > 800 else 2)


def test_thinking_that_is_off_is_closed_where_it_begins_nonetheless(model: edger1.Model, markers: Markers) -> None:
    found = model.generate("Hi", think="off")
    assert (found.thinking.strip(), found.text, found.usage.thought_tokens) == ("", "Yes", 0)
    assert found.notes == ()
    raw = model.generate("[user]Hi[assistant]", raw=True, think="off")
    assert raw.thinking == "abc def. a"


def test_a_thought_that_the_template_opens_is_closed_in_the_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recital(tokenizer: Any, tokens: list[int]) -> int:
        answered = str(tokenizer.decode(tokens, skip_special_tokens=False)).rpartition("[assistant]")[2]
        following = reply(ONE_TOKEN, answered, OWN_WORDS)
        return int(tokenizer.encode(following, add_special_tokens=False)[0] if following else tokenizer.eos_token_id)

    folder = write_tiny_model(tmp_path / "opened", template=TEMPLATE.replace("[assistant]{%", "[assistant]<think>\n{%"))
    recite(monkeypatch, recital)
    with edger1.load(folder) as model:
        plain = model.generate("Hi")
        assert (plain.thinking, plain.text) == ("abc def. a", "Yes")
        for options in ({"think": "off"}, {"think_budget": 0}):
            found = model.generate("Hi", **options)
            assert (found.thinking, found.text, found.usage.thought_tokens) == ("", "Yes", 0)
            # \n</think>\n\n
            assert found.usage.prompt_tokens == plain.usage.prompt_tokens + 4
            assert found.usage.completion_tokens == 4
        half = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "thought": "abc def"}]
        found = model.generate(half, continue_last=True, think_budget=5)
        assert (found.thinking, found.text, found.usage.thought_tokens) == ("", "Yes", 0)


@pytest.mark.parametrize("window", [None, 32])
def test_caches_that_give_nothing_back_are_made_anew(
    tmp_path: Path, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {} if window is None else {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": window}
    opened = "{{ messages[0].content }}<think>"
    folder = write_tiny_model(tmp_path / "speaking", template=opened, **kinds)
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 60}
    with edger1.load(folder, precision="exact") as model:
        own = model.generate("Hi<think>", raw=True, **options).thinking
    # Three letters are three tokens, two of which are in the caches when the third is known.
    end = own[45:48]
    thought = own[: own.index(end)]
    monkeypatch.setattr(loader, "thinking_markers", lambda path, tokenizer: Markers("<think>", end, blank="", gap=""))
    with edger1.load(folder, precision="exact") as model:
        found = model.generate("Hi", think_at_least=len(thought) + 20, **{**options, "max_tokens": 90})
    with edger1.load(folder, precision="exact") as model:
        expected = model.generate(f"Hi<think>{thought}\nWait", raw=True, **options).text.partition(end)[0]
    said = found.thinking.removeprefix(f"{thought}\nWait")
    assert said != found.thinking
    assert said[:10] == expected[:10]
