"""Answers taken out of completions, and whether they are the right ones."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edger1.errors import UsageError
from edger1.final_answers import boxed, fenced, final_answer, last_number, vote_key
from edger1.train.rewards.answers import exact, numeric
from edger1.train.rewards.completion import Completion, split_thought


def said(text: str, **columns: object) -> Completion:
    return Completion.from_text([{"role": "user", "content": "?"}], text, columns=columns, where="row 3")


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\nhm\n</think>\n\n4", "hm", "4"),
        ("hm</think>4", "hm", "4"),
        ("4", None, "4"),
        ("<think>on and on", "on and on", ""),
        ("Well. <think>hm</think> 4", "hm", "Well.\n4"),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_a_thought_ends_where_the_answer_begins(text: str, thinking: str | None, answer: str) -> None:
    assert split_thought(text) == (thinking, answer)


def test_a_thought_that_the_template_opened_is_one() -> None:
    completion = Completion.from_text("p", "hm</think>4", in_thought=True)
    assert (completion.thinking, completion.answer) == ("hm", "4")
    assert completion.text.startswith("<think>")
    assert Completion.from_text("p", "never ends", in_thought=True).answer == ""


def test_other_markers_become_the_usual_ones() -> None:
    completion = Completion.from_text("p", "[T]hm[/T]4", markers=("[T]", "[/T]"))
    assert (completion.thinking, completion.answer) == ("hm", "4")


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("<answer>3</answer> and <answer> 4 </answer>", "4"),
        ("It is \\boxed{\\frac{1}{2}}. Sure.", "\\frac{1}{2}"),
        ("<answer>\\boxed{7}</answer>", "7"),
        ("Some words.\nThe final answer is: **12**", "12"),
        ("Answer: yes", "yes"),
        ("So, the answer is 5", "5"),
        ("\\boxed{never closed", "\\boxed{never closed"),
        ("answering", "answering"),
        ("x**2 + 3*x**4", "x**2 + 3*x**4"),
        ("2**3 + (1)**2", "2**3 + (1)**2"),
        ("**12** or **13**", "12 or 13"),
        ("", ""),
    ],
)
def test_the_final_answer(answer: str, final: str) -> None:
    assert final_answer(answer) == final


def test_an_answer_of_several_lines() -> None:
    assert final_answer("Here:\n1 2\n3 4", lines=2) == "1 2\n3 4"


def test_nested_braces_are_balanced() -> None:
    assert boxed("\\boxed{1} then \\boxed{a{b}{c}}") == "a{b}{c}"
    assert boxed("none") is None
    assert boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert boxed("} \\boxed{\\boxed{3}} {") == "3"
    assert final_answer("<answer>1</answer> <answer>2") == "1"


def test_endless_repetition_takes_no_time() -> None:
    begin = time.monotonic()
    for piece in ("<answer>", "\\boxed{", "```python\n", "**a ", "1,", "1 ", "{", "</answer>", "answer ", "1/", "-1."):
        text = piece * 20_000
        for read in (final_answer, last_number, vote_key, fenced):
            read(text)
    assert time.monotonic() - begin < 10


def test_the_last_block_of_the_language_counts() -> None:
    text = "```python\na\n```\n```python\nb\n```\n```text\nc\n```"
    assert fenced(text, "python") == "b\n"
    assert fenced(text, "json") == "c\n"
    assert fenced("plain") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1234),
        ("$1,234.50", Fraction("1234.5")),
        ("1.234,5", Fraction("1234.5")),
        ("3,5", Fraction("3.5")),
        ("1 234 567", 1234567),
        ("1_000", 1000),
        ("3/4", Fraction(3, 4)),
        ("1 3/4", Fraction(7, 4)),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("−2", -2),
        ("2.5e3", 2500),
        ("x = 12 apples", 12),
        ("between 3 and 5", 5),
        ("3-4", 4),
        (".5", Fraction(1, 2)),
        ("10^{4} or 7", 7),
        ("12{,}345", 12345),
        ("no number", None),
        ("1/0", None),
    ],
)
def test_numbers_are_read(text: str, number: object) -> None:
    found = last_number(text)
    assert (found and found[0]) == number


@given(st.integers(-(10**9), 10**9))
def test_a_number_with_separators_is_itself(value: int) -> None:
    assert last_number(f"{value:,}") == (value, False)
    assert last_number(f"the answer is {value}.") == (value, False)


@given(st.text(max_size=60))
def test_any_text_can_be_looked_through(text: str) -> None:
    last_number(text)
    final_answer(text)
    vote_key(text)


def test_a_long_exponent_costs_nothing() -> None:
    assert numeric(said("9e99999999999", answer="1")) == 0.0


@pytest.mark.parametrize(
    ("text", "right", "options", "value"),
    [
        ("<think>5</think>1,000", "1000", {}, 1.0),
        ("<think>7</think>5", "7", {}, 0.0),
        ("50%", "0.5", {}, 1.0),
        ("50%", "50", {}, 1.0),
        ("50%", "50%", {}, 1.0),
        ("5%", "50%", {}, 0.0),
        ("1/3", "0.3333", {}, 0.0),
        ("1/3", "0.3333", {"relative": 1e-3}, 1.0),
        ("3.4", "3", {"absolute": 0.5}, 1.0),
        ("3.6", "3", {"absolute": 0.5}, 0.0),
        ("none", "3", {}, 0.0),
    ],
)
def test_numbers_are_compared(text: str, right: str, options: dict[str, float], value: float) -> None:
    assert numeric(said(text, answer=right), **options) == value


def test_any_of_several_right_answers_will_do() -> None:
    assert numeric(said("4", answer=[3, 4])) == 1.0
    assert exact(said("Four.", answer=["4", "four"])) == 1.0


def test_exact_is_exact_but_for_form() -> None:
    assert exact(said('The answer is "Paris".', answer="paris")) == 1.0
    assert exact(said("Paris", answer="paris"), case=True) == 0.0
    assert exact(said("It is Paris, I think", answer="Paris")) == 0.0
    assert exact(said("<think>Paris</think>", answer="Paris")) == 0.0


def test_a_row_without_the_answer_is_named() -> None:
    with pytest.raises(UsageError, match=r'row 3 has no column "answer".*its columns: solution'):
        exact(said("x", solution="y"))
    with pytest.raises(UsageError, match="row 3 has 'many' as its right answer; expected a number"):
        numeric(said("3", answer="many"))


def test_equal_answers_vote_together() -> None:
    assert vote_key("1,000") == vote_key("The answer is 1000.") == vote_key("\\boxed{1000}")
    assert vote_key("Yes.") == vote_key("yes")
    assert vote_key("50%") != vote_key("50")
    assert vote_key("") is None
    assert vote_key("1 and 2") != vote_key("2")
