"""Preference pairs from judged answers: which are made, which are not and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edger1.errors import FormatError, UsageError
from edger1.tasks.task import Question
from edger1.train.finetune.preferences import Answer, Answers, build, read_rollouts, read_samples, write

ASKED = [{"role": "user", "content": "?"}]


def prompt(where: str, *answers: tuple[str, int, bool], cut: int = 0) -> Answers:
    found = [Answer(text, length, right, True) for text, length, right in answers]
    return Answers(ASKED, where, found + [Answer("<think>\nand", 99, False, False)] * cut)


def contents(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kind"], row["chosen"][0]["content"], row["rejected"][0]["content"]


def test_the_shortest_right_answer_is_preferred_to_the_longest_right_and_the_longest_wrong() -> None:
    answers = [("mid", 5, True), ("short", 3, True), ("long", 9, True), ("no", 2, False), ("noooo", 7, False)]
    found = build([prompt("1", *answers)])
    assert [contents(row) for row in found.rows] == [("shorter", "short", "long"), ("right", "short", "noooo")]
    assert found.rows[0]["prompt"] == ASKED
    assert found.rows[0]["lengths"] == [3, 9]


def test_what_could_not_be_paired_is_counted() -> None:
    found = build(
        [
            prompt("none right", ("a", 1, False)),
            prompt("one right, none wrong", ("a", 1, True)),
            prompt("as long as each other", ("a", 4, True), ("b", 4, True), ("c", 2, False)),
            prompt("cut off", ("a", 1, True), ("b", 2, True), cut=3),
        ]
    )
    assert found.counts == {
        "prompts": 4,
        "pairs, shorter": 1,
        "pairs, right": 1,
        "prompts without a right answer": 1,
        "prompts with one right answer, or several of one length, none to be shorter than": 2,
        "prompts without a wrong answer": 2,
        "answers left aside, cut off": 3,
    }
    assert [row["source"] for row in found.rows] == ["as long as each other", "cut off"]


def test_one_kind_alone() -> None:
    found = build([prompt("1", ("a", 1, True), ("b", 2, True), ("c", 2, False))], ["right"])
    assert [row["kind"] for row in found.rows] == ["right"]
    assert "pairs, shorter" not in found.counts


def sample(prompt: int, text: str, accepted: bool, tokens: int | None = 5, finish: str = "stop") -> dict[str, Any]:
    about = {"prompt": prompt, "messages": ASKED, "source": f"line {prompt}", "finish": finish}
    return {**about, "text": text, "accepted": accepted, "tokens": tokens}


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_samples_of_a_distillation_are_read_and_without_counts_measured_in_characters(tmp_path: Path) -> None:
    rows = [sample(0, "right", True, 3), sample(0, "right too", True, 4), sample(1, "hm", False, None, "length")]
    found = read_samples(lines(tmp_path / "samples.jsonl", rows))
    assert [[(a.length, a.right, a.finished) for a in of.answers] for of in found] == [
        [(5, True, True), (9, True, True)],
        [(2, False, False)],
    ]


def rollout(number: int, row: int, text: str, reward: float, prompt: str = "line 1", **more: Any) -> dict[str, Any]:
    about = {"number": number, "row": row, "prompt": prompt, "tokens": len(text), "finished": True}
    return {**about, "text": text, "rewards": {"numeric": reward, "format": 1.0}, **more}


def test_rollouts_belong_together_by_prompt_and_the_last_of_a_place_counts(tmp_path: Path) -> None:
    rows = [
        rollout(0, 0, "first", 1.0),
        rollout(0, 1, "wrong", 0.0),
        rollout(7, 0, "again, later", 1.0),
        rollout(0, 0, "I see\n</think>\n\n5", 1.0),
        rollout(1, 0, "other", 0.0, "line 2", finished=False),
    ]
    path = lines(tmp_path / "rollouts.jsonl", rows)
    path.write_text(path.read_text() + '{"number": 9, "ro')
    questions = [Question(ASKED, {}, "line 1"), Question(ASKED, {}, "line 2")]
    one, two = read_rollouts(path, questions, "numeric")
    assert [(a.text, a.right) for a in one.answers] == [
        ("<think>\nI see\n</think>\n\n5", True),
        ("wrong", False),
        ("again, later", True),
    ]
    assert not two.answers[0].finished


def test_a_run_with_several_rewards_needs_its_judge_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, "a", 1.0)])
    questions = [Question(ASKED, {}, "line 1")]
    with pytest.raises(UsageError, match=r"rewards format, numeric; name .* --judge"):
        read_rollouts(path, questions, None)
    with pytest.raises(UsageError, match=r"no reward 'maths'; it has format, numeric"):
        read_rollouts(path, questions, "maths")


def test_prompts_of_another_run_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "rollouts.jsonl", [rollout(0, 0, "a", 1.0)])
    with pytest.raises(UsageError, match="'line 1', which is not among --prompts"):
        read_rollouts(path, [Question(ASKED, {}, "line 9")], "numeric")


@pytest.mark.parametrize("text", ["{]\n", '{"a": 1}\n', "[]\n"])
def test_what_is_no_log_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    for read in (read_samples, lambda path: read_rollouts(path, [], None)):
        with pytest.raises(FormatError, match="line 1"):
            read(tmp_path / "log")


def test_the_same_answers_give_the_same_file(tmp_path: Path) -> None:
    rows = [
        sample(i, "x" * (1 + (i * 7 + n * 5) % 11), (i + n) % 3 > 0, (i * 7 + n * 5) % 11)
        for i in range(9)
        for n in range(5)
    ]
    lines(tmp_path / "samples.jsonl", rows)
    for name in ("one", "two"):
        write(tmp_path / name, build(read_samples(tmp_path / "samples.jsonl")))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len((tmp_path / "one").read_text().splitlines()) > 9
