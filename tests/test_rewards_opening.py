"""Rewards by name: options, weights, the user's own functions in their process, and what goes wrong in them."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edger1.errors import RewardError, UsageError
from edger1.train.rewards.calling import as_number
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.opening import Rewards, open_rewards

FUNCTIONS = """
import os, re, sys, time
import numpy as np
from edger1.train.rewards import Completion

print("printing does not break anything")

def whole(completion: Completion) -> float:
    return len(completion.answer) + completion.tokens / 100

def other_name(c: "Completion", *, factor=1):
    return factor * 2

def simple(prompt, answer, reference, level=0, **columns):
    return float(answer == reference) + level + (0.5 if prompt == "2 + 2?" else 0) + len(columns) * 100

def strict(prompt, answer, missing):
    return 1

def scaled(completion, scale=1.0):
    return scale

def scalar(completion):
    print("x" * 100000)
    return np.float32(0.25)

def raising(completion):
    return {}["nothing"]

def none(completion):
    pass

def nan(completion):
    return float("nan")

def text(completion):
    return "1"

def sleeping(completion):
    time.sleep(60 if completion.answer == "slow" else 0)
    return 1

def hanging_in_c(completion):
    if completion.answer == "slow":
        re.match(r"(a+)+$", "a" * 40 + "b")
    return 1

def dying(completion):
    if completion.answer == "slow":
        os._exit(7)
    return 1

def wrong(a, b, c):
    return 1

not_a_function = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def opened(file: Path) -> Iterator[Callable[..., Rewards]]:
    all_: list[Rewards] = []

    def open_(*functions: str, **options: object) -> Rewards:
        rewards = open_rewards([f"{file}:{name}" for name in functions], **options)  # type: ignore[arg-type]
        all_.append(rewards)
        return rewards

    yield open_
    for rewards in all_:
        rewards.close()


def said(text: str = "4", tokens: int = 0, /, where: str = "data.jsonl, line 7", **columns: object) -> Completion:
    return Completion.from_text(
        [{"role": "user", "content": "2 + 2?"}], text, columns=columns, tokens=tokens, where=where
    )


def test_functions_of_the_user_in_both_forms(opened: Callable[..., Rewards]) -> None:
    rewards = opened("whole", "other_name:factor=3", "simple", "scaled:scale=2.5,weight=0.5", "scalar")
    first, second = rewards.score([said("4", 10, answer="4"), said("5", answer="4", level=2)])
    assert list(first.values()) == [1.1, 6.0, 1.5, 2.5, 0.25]
    assert list(second.values()) == [1.0, 6.0, 2.5, 2.5, 0.25]
    assert rewards.names[3] == "mine.py:scaled"
    assert rewards.total(first) == pytest.approx(1.1 + 6 + 1.5 + 0.5 * 2.5 + 0.25)


def test_columns_that_a_function_has_no_parameter_for_go_to_its_keywords(opened: Callable[..., Rewards]) -> None:
    (value,) = opened("simple").score([said("4", answer="4", extra=1)])
    assert value == {"mine.py:simple": 101.5}


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("raising", r"raised KeyError: 'nothing' \(mine.py, line \d+\)"),
        ("none", "gave None instead of a number; does every branch return one\\?"),
        ("nan", "gave nan, which is no finite number"),
        ("text", r"gave '1' \(str\) instead of a number"),
        ("strict", r"raised LookupError: the row has no column missing \(it has: reference\)"),
    ],
)
def test_a_failing_function_is_named_with_its_row(opened: Callable[..., Rewards], function: str, what: str) -> None:
    expected = rf'The reward "mine.py:{function}" {what}, for completion 1 of 1: data.jsonl, line 8'
    with pytest.raises(RewardError, match=expected):
        opened(function).score([said(where="data.jsonl, line 8", answer="4")])


@pytest.mark.parametrize(
    ("function", "what"),
    [
        ("sleeping", "took longer than 2 s and was ended"),
        ("hanging_in_c", "took longer than 2 s and was ended"),
        ("dying", "ended its process with exit code 7"),
    ],
)
def test_a_function_that_hangs_or_dies_stops_nothing_else(
    opened: Callable[..., Rewards], function: str, what: str
) -> None:
    rewards = opened(f"{function}:timeout=2", on_error="zero")
    begin = time.monotonic()
    scores = rewards.score([said("ok"), said("slow"), said("ok")])
    assert [list(score.values()) for score in scores] == [[1.0], [0.0], [1.0]]
    assert time.monotonic() - begin < 20
    (failure,) = rewards.failures
    assert f'"mine.py:{function}" {what}, for completion 2 of 3: data.jsonl, line 7. It counts as 0.' in failure
    assert rewards.failed == 1


def test_closing_ends_the_process(opened: Callable[..., Rewards]) -> None:
    rewards = opened("scalar")
    assert rewards._worker is not None
    process = rewards._worker._process
    assert process is not None
    rewards.close()
    rewards.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:gone", "has no function gone; it has whole, other_name"),
        ("{file}:not_a_function", "has no function not_a_function"),
        ("{file}:wrong", r"takes \(a, b, c\); expected def reward\(completion\) or def reward\(prompt, answer"),
        ("{file}:scaled:depth=2", "has no parameter depth; its parameters: completion, scale"),
        ("{folder}/gone.py:f", "gone.py, which is not there"),
        ("{folder}/broken.py:f", r"cannot be opened: .*broken.py raised SyntaxError"),
        ("wisdom", 'There is no reward "wisdom"; there are exact, numeric'),
        ("mine.py", "FILE.py:FUNCTION"),
        ("exact:weight=heavy", "has weight=heavy; expected a number"),
        ("exact:timeout=0", "expected seconds above 0"),
        ("exact:weight", "expected key=value"),
        ("exact:colour=red", "has no option colour; it has column, case, weight, timeout"),
        ("exact:case=maybe", "has case='maybe'; expected true or false"),
        ("length", "needs target; write length:target="),
        ("numeric:relative=wide", "has relative='wide'; expected a number"),
        ("gym", "names no task; expected gym:TASK"),
        ("cosine:longest=100", "needs another that tells whether an answer is right"),
        ("exact:by=format", "by= is for cosine"),
        ("", "expected text such as numeric"),
    ],
)
def test_what_cannot_be_opened_is_said(file: Path, spec: str, message: str) -> None:
    (file.parent / "broken.py").write_text("def f(:\n")
    with pytest.raises(UsageError, match=message):
        open_rewards([spec.format(file=file, folder=file.parent)])


def test_lists_and_policies_are_checked() -> None:
    with pytest.raises(UsageError, match="expected a list"):
        open_rewards("exact")
    with pytest.raises(UsageError, match="expected a list"):
        open_rewards([])
    with pytest.raises(UsageError, match='expected "stop" or "zero"'):
        open_rewards(["exact"], on_error="ignore")
    with pytest.raises(UsageError, match="exact is listed twice"):
        open_rewards(["exact", "exact:case=true"])


def test_built_in_rewards_with_weights_and_names() -> None:
    with open_rewards(["exact:weight=2", "format:weight=0.5", "exact:name=strict,case=true"]) as rewards:
        assert rewards.names == ("exact", "format", "strict")
        (scores,) = rewards.score([said("<think>hm</think>paris", answer="Paris")])
        assert scores == {"exact": 1.0, "format": 1.0, "strict": 0.0}
        assert rewards.total(scores) == 2.5
        assert rewards.judge == "exact"
        assert rewards.right(scores)


def test_the_judge_is_the_first_that_knows_the_answer() -> None:
    with open_rewards(["format", "length:target=5", "numeric"]) as rewards:
        assert rewards.judge == "numeric"
        assert not rewards.right({"format": 1.0, "length": 1.0, "numeric": 0.0})


def test_cosine_depends_on_another_wherever_it_is_listed() -> None:
    with open_rewards(["cosine:longest=100", "numeric"]) as rewards:
        right, wrong = rewards.score([said("4", 10, answer="4"), said("5", 10, answer="4")])
    assert right["cosine"] > 1.9
    assert wrong["cosine"] < -9
    assert list(right) == ["cosine", "numeric"]
    with pytest.raises(UsageError, match="has by=exact; the other rewards listed: numeric"):
        open_rewards(["numeric", "cosine:longest=10,by=exact"])


def test_a_row_that_lacks_the_answer_stops_under_either_policy() -> None:
    with open_rewards(["exact"], on_error="zero") as rewards, pytest.raises(UsageError, match="line 7 has no column"):
        rewards.score([said("4")])


def test_numbers_of_other_kinds_are_numbers() -> None:
    import numpy as np

    assert [as_number(value) for value in (True, 2, np.float64(0.5), np.array([3]))] == [1.0, 2.0, 0.5, 3.0]
    for value in (float("inf"), [1], np.array([1, 2])):
        with pytest.raises(ValueError, match="gave"):
            as_number(value)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="math-verify is NOT INSTALLED")
def test_equal_maths_is_equal_and_a_tower_of_powers_hangs_nothing() -> None:
    answers = ["\\boxed{\\frac{1}{2}}", "The answer is 0.5", "$x^2 + 2x + 1$", "$(x+1)^2$", "2", "$9^{9^{9^{9}}}$", ""]
    rights = ["0.5", "\\frac{1}{2}", "(x+1)^2", "$x^2+2x+1$", "3", "3", "3"]
    with open_rewards(["maths:timeout=6"]) as rewards:
        rows = [said(answer, answer=right) for answer, right in zip(answers, rights, strict=True)]
        values = [score["maths"] for score in rewards.score(rows)]
    assert values == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
