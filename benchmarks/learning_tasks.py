"""Questions of reasoning-gym (Apache-2.0) for the learning experiments, with the steps that the package does not give.

Tasks that the nano models never saw (`recipes/nano/kinds.py` has those they did). A question belongs to one set only,
by a hash of its words: held-out questions are in no training set, nor questions for rewards among those with traces.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

Entry = Mapping[str, Any]
Part = Literal["held-out", "traces", "rewards"]

_PARTS: tuple[Part, ...] = ("held-out", "traces", "rewards", "rewards")
"""A quarter each; the questions for rewards take two."""
_AT_ONCE = 1000


@dataclass(frozen=True)
class Task:
    """A task of reasoning-gym at a difficulty: the package's name and settings, and who writes the steps."""

    name: str
    settings: Mapping[str, Any]
    steps: Callable[[Entry], list[str]]


@dataclass(frozen=True)
class Question:
    """One question; `entry` is reasoning-gym's, which its grader takes."""

    text: str
    answer: str
    steps: tuple[str, ...]
    entry: Entry

    def messages(self) -> list[dict[str, str]]:
        """Return the question and its worked solution as a chat."""
        thoughts = "\n".join(self.steps)
        return [
            {"role": "user", "content": self.text},
            {"role": "assistant", "content": f"<think>\n{thoughts}\n</think>\n\n{self.answer}"},
        ]

    def without_steps(self) -> list[dict[str, str]]:
        """Return the question and its answer as a chat whose thought is empty."""
        return [
            {"role": "user", "content": self.text},
            {"role": "assistant", "content": f"<think>\n\n</think>\n\n{self.answer}"},
        ]


def _equation(entry: Entry) -> list[str]:
    """Return the term moved to the other side, and the division that is left."""
    told = entry["metadata"]
    left, right = told["equation"].split(" = ")
    total, (factor, added) = int(right), _linear(left, told["variable"])
    steps = []
    if added:
        steps.append(f"{total} {'-' if added > 0 else '+'} {abs(added)} = {total - added}")
    return [*steps, f"{total - added} / {factor} = {(total - added) // factor}"]


def _linear(text: str, variable: str) -> tuple[int, int]:
    """Return (a, b) of "a*x + b" in any order, as the package prints it."""
    factor = added = 0
    for sign, term in re.findall(r"([+-]?)\s*([0-9a-z*]+)", text):
        number, _, letter = term.rpartition("*")
        if variable in (letter, term):
            factor += (-1 if sign == "-" else 1) * int(number or 1)
        else:
            added += (-1 if sign == "-" else 1) * int(term)
    return factor, added


EQUATIONS = Task(
    "simple_equations",
    {"min_terms": 2, "max_terms": 2, "min_value": 2, "max_value": 30, "operators_weights": [0.5, 0.5, 0.0]},
    _equation,
)


def dataset(task: Task, size: int, seed: int) -> Any:
    """Return the package's data set of a task. Its grader is `score_answer(answer, entry)`."""
    return importlib.import_module("reasoning_gym").create_dataset(task.name, size=size, seed=seed, **task.settings)


def part_of(text: str) -> Part:
    """Return which set a question belongs to, whatever its place in a data set."""
    return _PARTS[int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 8 // 2]


def questions(task: Task, part: Part, number: int, seed: int = 1) -> list[Question]:
    """Return `number` different questions of one set; the same seed gives the same ones."""
    found: dict[str, Question] = {}
    for entry in _entries(task, seed):
        text = entry["question"].strip()
        if part_of(text) != part or text in found:
            continue
        found[text] = Question(text, str(entry["answer"]), tuple(task.steps(entry)), entry)
        if len(found) == number:
            break
    return list(found.values())


def _entries(task: Task, seed: int) -> Iterator[Entry]:
    for block in count():
        # Seeds a million apart: the package adds an entry's number to its seed.
        yield from dataset(task, _AT_ONCE, (seed * 1000 + block) * 1_000_003)
