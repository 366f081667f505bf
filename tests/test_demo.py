"""Sample questions: which are asked, what counts as right, and the command over the model that comes along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edger1 import demo, paths
from edger1.answers import same_answer
from edger1.cli import app
from edger1.demo import FILE, questions
from edger1.errors import FormatError, UsageError


def write(folder: Path, kinds: dict[str, int]) -> Path:
    rows = [
        {"task": task, "question": f"{task} {i}?", "answer": str(i)}
        for task, count in kinds.items()
        for i in range(count)
    ]
    (folder / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("42.", "42"),
        (" 007", "7"),
        ("Pear,  apple", "pear, apple"),
        ("['15', '3']", "['15','3']"),
        ("24 remainder  1", "24 remainder 1"),
        ("-5", "-5"),
    ],
)
def test_the_same_answers(given: str, expected: str) -> None:
    assert same_answer(given, expected)


@pytest.mark.parametrize(
    ("given", "expected"), [("", ""), ("5", "-5"), ("1, 2", "2, 1"), ("1, 2", "1, 2, 3"), ("pear apple", "pear, apple")]
)
def test_other_answers(given: str, expected: str) -> None:
    assert not same_answer(given, expected)


def test_every_kind_comes_before_one_comes_again(tmp_path: Path) -> None:
    write(tmp_path, {"a": 3, "b": 1, "c": 5})
    asked = questions(tmp_path, 6, seed=4)
    assert {q.task for q in asked[:3]} == {"a", "b", "c"}
    assert {q.task for q in asked[3:5]} == {"a", "c"}
    assert len(set(asked)) == 6
    assert asked == questions(tmp_path, 6, seed=4)
    assert {tuple(questions(tmp_path, 6)) for _ in range(20)} != {tuple(asked)}
    assert len(questions(tmp_path, 100)) == 9


def test_a_model_without_samples_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no sample questions"):
        questions(tmp_path, 3)
    for text in ("{", '{"task": "a"}\n', '["a"]\n'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(FormatError, match="is damaged"):
            questions(tmp_path, 3)


def test_the_model_that_comes_along_answers_most_of_its_questions() -> None:
    result = CliRunner().invoke(app, ["demo", "--questions", "32", "--seed", "1", "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["asked"] == len(said["questions"]) == 32
    assert said["right"] == sum(row["right"] for row in said["questions"]) >= 13
    assert all(
        row["right"] == same_answer(row["answer"], row["expected"]) for row in said["questions"] if row["answer"]
    )
    assert any(row["thinking"] for row in said["questions"])


def test_what_is_shown_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    good, *_ = questions(paths.assets() / "nano-moe", 1, seed=1)
    monkeypatch.setattr(
        demo, "questions", lambda *_: [good, demo.Question(good.task, good.question, "something else altogether")]
    )
    result = CliRunner().invoke(app, ["demo"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "wrong, expected something else altogether" in result.stdout
    assert "of 2 right" in result.stdout
