"""Rewards for form, length, language and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from edger1.errors import UsageError
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.form import form, schema
from edger1.train.rewards.language import language
from edger1.train.rewards.length import cosine, length, overlong


def said(text: str, tokens: int = 0, finished: bool = True, **columns: object) -> Completion:
    return Completion.from_text("p", text, columns=columns, tokens=tokens, finished=finished, where="row 3")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think>b", 1.0),
        ("\n<think>a</think>\nb", 1.0),
        ("b", 0.0),
        ("<think>a</think>", 0.0),
        ("<think></think>b", 0.0),
        ("<think>a", 0.0),
        ("a</think>b", 0.0),
        ("<think>a<think></think>b", 0.0),
        ("<think>a</think>b</think>", 0.0),
        ("Hello <think>a</think>b", 0.0),
    ],
)
def test_one_thought_and_then_an_answer(text: str, value: float) -> None:
    assert form(said(text)) == value


def test_a_thought_that_the_template_opened_has_its_form() -> None:
    assert form(Completion.from_text("p", "a</think>b", in_thought=True)) == 1.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<answer>4</answer>", 1.0),
        ("So <answer>4</answer>", 1.0),
        ("<answer></answer>", 0.0),
        ("<answer>4</answer> then", 0.0),
        ("<answer>4</answer><answer>5</answer>", 0.0),
        ("4", 0.0),
    ],
)
def test_one_answer_in_tags_at_the_end(answer: str, value: float) -> None:
    assert form(said(f"<think>a</think>{answer}"), answer=True) == value


def test_parts_of_the_form_count_where_asked() -> None:
    assert form(said("\\boxed{4}"), boxed=True) == 0.0
    assert form(said("\\boxed{4}"), boxed=True, partial=True) == 0.5
    assert form(said("\\boxed{4}"), think=False, boxed=True) == 1.0
    with pytest.raises(UsageError, match="asks for nothing"):
        form(said("x"), think=False)


def test_length_is_best_at_its_target() -> None:
    values = [length(said("", tokens=n), target=100) for n in (0, 50, 100, 150, 200, 900)]
    assert values == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]


def test_overlong_is_punished_softly() -> None:
    values = [overlong(said("", tokens=n), limit=100, buffer=20) for n in (10, 80, 90, 100, 500)]
    assert values == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(UsageError, match="expected a buffer from 1 to the limit"):
        overlong(said(""), limit=10, buffer=20)


def test_cosine_prefers_short_right_and_long_wrong_answers() -> None:
    def at(tokens: int, correct: bool, finished: bool = True) -> float:
        return cosine(said("", tokens=tokens, finished=finished), correct=correct, longest=100)

    assert at(0, True) == 2.0
    assert at(0, False) == -10.0
    assert at(50, True) == pytest.approx(1.5)
    assert at(50, False) == pytest.approx(-5.0)
    assert at(99, True) == pytest.approx(1.0 + 0.5 * (1 + math.cos(0.99 * math.pi)))
    assert at(100, True) == at(10, True, finished=False) == -10.0
    assert at(10, True) > at(90, True)
    assert at(90, False) > at(10, False)


def test_the_share_of_a_script() -> None:
    assert language(said("hello 123 + x"), script="latin") == 1.0
    assert language(said("ab你好"), script="latin") == 0.5
    assert language(said("ab你好"), script="han") == 0.5
    assert language(said("かな漢字"), script="japanese") == 1.0
    assert language(said("12 + 3 = 15"), script="latin") == 1.0
    assert language(said("let α be x"), script="latin") == 1.0
    assert language(said("<think>你好</think>hello"), script="latin", of="answer") == 1.0
    assert language(said("<think>你好</think>hello"), script="latin", of="thinking") == 0.0
    with pytest.raises(UsageError, match='script="english"; expected one of latin'):
        language(said("x"), script="english")


def test_json_is_checked_against_the_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    wanted = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(wanted))
    for text, value in (
        ('{"a": 1}', 1.0),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', 1.0),
        ('{"a": "1"}', 0.0),
        ("not json", 0.0),
        ('{"a": NaN}', 0.0),
    ):
        assert schema(said(text), file=str(file)) == value
        assert schema(said(text, schema=wanted)) == value
    with pytest.raises(UsageError, match='row 3 has no column "schema"'):
        schema(said("{}"))
    with pytest.raises(UsageError, match="no valid JSON schema"):
        schema(said("{}", schema={"type": 7}))
    with pytest.raises(UsageError, match="refers to"):
        schema(said("{}", schema={"$ref": "http://127.0.0.1:9/x.json"}))
