"""What a teacher is asked: the prompts of a file, or questions that reasoning-gym generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edger1.errors import UsageError
from edger1.tasks.task import Question
from edger1.train.datasets.rows import Row
from edger1.train.rewards.completion import split_thought

if TYPE_CHECKING:
    from edger1.train.rewards.opening import Rewards

GENERATED = "gym:"


@dataclass(frozen=True)
class Prompts:
    """Questions, and the reward of the task they come from, where they come from one."""

    name: str
    questions: list[Question]
    reward: Rewards | None = None
    bad: int = 0
    """Rows of the file that were none and were left out."""


def read_prompts(source: str, *, size: int | None = None, seed: int = 0, skip_bad: bool = False) -> Prompts:
    """Read the prompts of a file, the first `size` of them, or let `gym:TASK` generate `size`.

    Of a conversation that ends with an answer, what comes before it is asked; the answer, without its thought, is
    column `answer` for the verifier, unless the row has one.

    Raises UsageError where there are none, FormatError for a bad row.
    """
    if size is not None and size < 1:
        raise UsageError(f"--size is {size}; expected at least 1 prompt.")
    if source.startswith(GENERATED):
        from edger1.tasks.task import open_task

        task = open_task(source, size=size, seed=seed)
        return Prompts(source, list(task.questions), task.reward)
    from edger1.train.datasets.reading import read

    found = read(source, kind="prompt", skip_bad=skip_bad)
    questions = [question_of(row) for row in found.rows[:size]]
    if not questions:
        raise UsageError(f"{source} has no prompts.")
    return Prompts(Path(source).name, questions, None, found.bad_count)


def question_of(row: Row) -> Question:
    """Return a row of kind "prompt" as a question."""
    columns = dict(row.columns)
    if isinstance(columns.get("completion"), str):
        columns.setdefault("answer", split_thought(columns["completion"])[1])
    return Question(row.messages or [], columns, row.where)


def without(questions: Sequence[Question], evaluation: Sequence[str]) -> tuple[list[Question], int]:
    """Return the questions that share no passage with the prompts of evaluation files, and how many did."""
    from edger1.train.datasets.reading import read
    from edger1.train.datasets.splitting import decontaminate

    held = [row for path in evaluation for row in read(path).rows]
    rows = [Row(str(i), question.messages, None, {}) for i, question in enumerate(questions)]
    left, dropped = decontaminate(rows, held)
    return [questions[int(row.where)] for row in left], len(dropped)
