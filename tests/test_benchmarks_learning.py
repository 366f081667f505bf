"""The learning experiments' questions: sets apart from each other, steps that lead to the answer."""

from __future__ import annotations

import pytest

from benchmarks.learning_runs import Right, is_right

pytest.importorskip("reasoning_gym")

from benchmarks.learning_tasks import EQUATIONS, questions


def test_a_question_is_in_one_set_only() -> None:
    sets = [{q.text for q in questions(EQUATIONS, part, 30)} for part in ("held-out", "traces", "rewards")]
    assert [len(found) for found in sets] == [30] * 3
    assert len(set.union(*sets)) == 90


def test_the_same_seed_gives_the_same_questions() -> None:
    assert questions(EQUATIONS, "traces", 20) == questions(EQUATIONS, "traces", 20)


def test_worked_solutions_end_in_the_answer_that_the_grader_takes() -> None:
    for question in questions(EQUATIONS, "traces", 60):
        text = question.messages()[1]["content"]
        assert is_right(EQUATIONS, question, text, finished=True)
        for step in question.steps:
            left, right = step.split(" = ")
            a, sign, b = left.split()
            assert int(right) == {"+": int(a) + int(b), "-": int(a) - int(b), "/": int(a) // int(b)}[sign]


def test_an_answer_counts_only_after_the_thought_and_where_it_ended() -> None:
    question = questions(EQUATIONS, "held-out", 1)[0]
    right = f"<think>\nso\n</think>\n\n{question.answer}"
    assert is_right(EQUATIONS, question, right, finished=True)
    assert not is_right(EQUATIONS, question, right, finished=False)
    assert not is_right(EQUATIONS, question, question.answer, finished=True)
    assert not is_right(EQUATIONS, question, f"</think>\n\n{int(question.answer) + 1}", finished=True)


def test_the_interval_is_wilsons() -> None:
    low, high = Right(50, 100).interval()
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert Right(0, 100).interval()[0] == pytest.approx(0, abs=1e-12)
