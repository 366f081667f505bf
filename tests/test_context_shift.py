"""A context that is full: the answer ends and says why, or, where that was asked for, goes on without its middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

import edger1
from edger1.context_shift import ContextShift
from edger1.errors import UsageError

Message = dict[str, Any]


def encode(messages: list[Message]) -> list[int]:
    """A token a character."""
    return [ord(c) for message in messages for c in f"<{message['content']}>"]


def render(messages: list[Message]) -> tuple[str, list[int]]:
    return text(encode(messages)), encode(messages)


def talk(*lengths: int) -> list[Message]:
    """A system prompt of 10 tokens, and turns of so many tokens each, questions and answers; the last has no answer."""
    messages: list[Message] = [{"role": "system", "content": "s" * 8}]
    for i, length in enumerate(lengths):
        letter = chr(ord("a") + i)
        messages.append({"role": "user", "content": letter * (length // 2 - 2)})
        messages.append({"role": "assistant", "content": letter.upper() * (length - length // 2 - 2)})
    return messages[:-1]


def text(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def test_a_prompt_that_fits_is_left_alone() -> None:
    messages = talk(20, 20)
    shift = ContextShift(100, messages, render)
    assert shift.fit(encode(messages), 30) == encode(messages)
    assert shift.times == 0


def test_the_oldest_turns_go_and_the_system_prompt_stays() -> None:
    messages = talk(40, 40, 40, 20)
    shift = ContextShift(100, messages, render)
    kept = shift.fit(encode(messages), None)
    # 140 tokens and room for 25 are 55 too many: in steps of 25 these are 75, which two turns are.
    assert text(kept) == shift.text == text(encode([messages[0], *messages[5:]]))
    assert (shift.turns, shift.tokens) == (2, 80)
    assert "the 2 oldest turns" in shift.note()
    assert len(kept) <= 75


def test_a_conversation_that_goes_on_loses_the_same_turns_for_a_while() -> None:
    dropped = []
    for extra in range(0, 24, 6):
        messages = talk(40, 40, 40, 20 + extra)
        shift = ContextShift(100, messages, render)
        shift.fit(encode(messages), None)
        dropped.append(shift.turns)
    assert dropped == [2, 2, 2, 2]


def test_an_answer_goes_on_without_the_oldest_turns() -> None:
    messages = talk(30, 30, 20)
    before = encode(messages)
    answer = list(range(1000, 1000 + 100 - len(before)))
    shift = ContextShift(100, messages, render)
    kept, inside = shift.go_on(before, answer)
    assert text(kept) == text(encode([messages[0], *messages[3:]]))
    assert not inside
    assert (shift.turns, shift.tokens) == (1, 30)


def test_where_no_turn_is_left_the_older_half_of_the_answer_goes() -> None:
    messages = talk(20)
    before = encode(messages)
    answer = list(range(1000, 1000 + 100 - len(before)))
    shift = ContextShift(100, messages, render)
    kept, inside = shift.go_on(before, answer)
    assert (inside, shift.text) == (True, "")
    assert kept[: len(before)] == before
    rest = kept[len(before) :]
    assert rest == answer[-len(rest) :]
    assert len(rest) == len(answer) - len(answer) // 2
    assert shift.tokens == len(answer) // 2
    # And again: the prompt is still the beginning.
    more = list(range(2000, 2000 + 100 - len(kept)))
    again, _ = shift.go_on(kept, more)
    assert again[: len(before)] == before
    assert again[-len(more) :] == more
    assert shift.times == 2


def test_of_a_prompt_longer_than_the_context_its_beginning_and_end_stay() -> None:
    prompt = list(range(350))
    shift = ContextShift(100, None, render)
    kept = shift.fit(prompt, None)
    assert kept[:25] == prompt[:25]
    tail = kept[25:]
    assert tail == prompt[-len(tail) :]
    assert len(tail) > 20
    assert len(kept) <= 75
    assert shift.tokens == 350 - len(kept)


def test_a_template_that_wants_its_turns_loses_tokens() -> None:
    def refuse(messages: list[Message]) -> tuple[str, list[int]]:
        raise UsageError("Conversation roles must alternate.")

    messages = talk(40, 40, 40, 20)
    shift = ContextShift(100, messages, refuse)
    assert len(shift.fit(encode(messages), None)) <= 75
    assert shift.turns == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def load(folder: Path, **options: Any) -> edger1.Model:
    return edger1.load(folder, **{"precision": "exact", "context": 128, **options})


def test_without_asking_a_full_context_ends_the_answer_and_says_so(folder: Path) -> None:
    with load(folder) as model:
        answer = model.generate("Hello", temperature=0)
        short = model.generate("Hello", temperature=0, max_tokens=5)
    assert answer.finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == 128
    assert len(answer.notes) == 1
    assert "context of 128 tokens is full" in answer.notes[0]
    assert (short.finish_reason, short.notes) == ("length", ())


def test_a_context_that_is_full_in_the_middle_of_a_thought(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "", "thought": "Let me see"}]
    with load(folder) as model:
        ended = model.generate(messages, continue_last=True, temperature=0)
        went_on = model.generate(messages, continue_last=True, temperature=0, context_shift=True, max_tokens=200)
    assert (ended.finish_reason, ended.text) == ("length", "")
    assert ended.thinking
    assert "in the middle of a thought" in ended.notes[0]
    assert went_on.finish_reason == "length"
    assert went_on.usage.completion_tokens == 200
    assert (went_on.text, went_on.thinking[: len(ended.thinking)]) == ("", ended.thinking)
    assert "were dropped" in went_on.notes[0]


@pytest.mark.parametrize("options", [{}, {"speculate": "lookup"}, {"repetition_penalty": 1.2}], ids=str)
def test_what_goes_on_is_what_the_kept_tokens_alone_would_say(folder: Path, options: dict[str, Any]) -> None:
    with load(folder, context=96) as model:
        long = model.generate("Hello", raw=True, temperature=0, max_tokens=150, context_shift=True, **options)
    assert long.usage.completion_tokens == 150
    with load(folder, context=400) as model:
        first = model.generate("Hello", raw=True, temperature=0, max_tokens=96 - 5, **options)
        assert long.text[: 96 - 5] == first.text
        known = "Hello" + first.text
        # One token a character: the prompt and the younger half of the answer stay.
        kept = known[:5] + known[5 + (96 - 5) // 2 :]
        after = model.generate(kept, raw=True, temperature=0, max_tokens=96 - len(kept), **options)
    assert long.text[96 - 5 :].startswith(after.text)
    assert len(after.text) > 30


def test_answers_that_are_decoded_together_shift_each_alone(folder: Path) -> None:
    words = ["Hello", "What is new?", "x"]
    options: dict[str, Any] = {"raw": True, "temperature": 0, "max_tokens": 200, "context_shift": True}
    with load(folder) as model:
        alone = [model.generate(word, **options).text for word in words]
    with load(folder) as model:
        handles = [model.submit(word, **options) for word in words]
        together = [handle.result(timeout_s=120) for handle in handles]
    assert [answer.text for answer in together] == alone
    assert all(answer.usage.completion_tokens == 200 for answer in together)


def test_a_conversation_outgrows_its_context_turn_by_turn(folder: Path) -> None:
    with load(folder, context=768) as model:
        chat = model.chat(system="S" * 20)
        used = [
            chat.send(f"Question {number}", max_tokens=20, temperature=0, context_shift=True) for number in range(18)
        ]
        with pytest.raises(edger1.ContextError, match="--context-shift"):
            chat.send("And now?", max_tokens=20)
    assert all(answer.usage.prompt_tokens + 20 <= 768 for answer in used)
    assert not used[13].notes
    assert "oldest turns" in used[14].notes[0]
    # The turns that went are the same for a while, and what stays is found in the cache.
    assert all(answer.usage.prefilled_tokens < 40 for answer in (*used[1:14], *used[15:]))


def test_without_a_limit_an_answer_is_at_most_as_long_as_the_context(folder: Path) -> None:
    with load(folder) as model:
        answer = model.generate("Hello", raw=True, temperature=0, context_shift=True)
    assert (answer.finish_reason, answer.usage.completion_tokens) == ("length", 128)
    assert "as long as the context" in answer.notes[-1]


def test_it_is_a_switch(folder: Path) -> None:
    with load(folder) as model, pytest.raises(edger1.UsageError, match="context_shift"):
        model.generate("Hello", context_shift=5)  # type: ignore[typeddict-item]
