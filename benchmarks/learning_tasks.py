"""Questions of reasoning-gym (Apache-2.0) for the learning experiments, with the steps that the package does not give.

Tasks that the nano models never saw (`recipes/nano/kinds.py` has those they did). A question belongs to one set only,
by a hash of its words: held-out questions are in no training set, nor are questions for rewards among those with traces.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

Entry = Mapping[str, Any]
Part = Literal["held-out", "traces", "rewards", "teacher"]

_PARTS: tuple[Part, ...] = ("held-out", "traces", "rewards", "teacher")
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


def _digits(number: int, base: int) -> str:
    found = ""
    while number:
        number, digit = divmod(number, base)
        found = f"{digit}{found}"
    return found or "0"


def _base_conversion(entry: Entry) -> list[str]:
    told = entry["metadata"]
    source, target = told["source_base"], told["target_base"]
    digits = [int(digit) for digit in told["source_repr"]]
    value, steps = digits[0], []
    for digit in digits[1:]:
        steps.append(f"{value} * {source} + {digit} = {value * source + digit}")
        value = value * source + digit
    while value:
        steps.append(f"{value} / {target} = {value // target} rest {value % target}")
        value //= target
    return steps


def _lcm(entry: Entry) -> list[str]:
    first, second = entry["metadata"]["numbers"]
    a, b = max(first, second), min(first, second)
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    steps.append(f"{first} / {a} = {first // a}")
    steps.append(f"{first // a} * {second} = {first // a * second}")
    return steps


def _fraction(entry: Entry) -> list[str]:
    top, bottom = entry["metadata"]["numerator"], entry["metadata"]["denominator"]
    a, b = max(top, bottom), min(top, bottom)
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    steps.append(f"{top} / {a} = {top // a}")
    steps.append(f"{bottom} / {a} = {bottom // a}")
    return steps


BASE_CONVERSION = Task(
    "base_conversion", {"min_base": 2, "max_base": 9, "min_value": 10, "max_value": 300}, _base_conversion
)
LCM = Task("lcm", {"min_value": 2, "max_value": 99}, _lcm)
FRACTION = Task("fraction_simplification", {"max_value": 50, "max_factor": 12, "styles": ("plain",)}, _fraction)
TASKS = {task.name: task for task in (BASE_CONVERSION, LCM, FRACTION)}


def dataset(task: Task, size: int, seed: int) -> Any:
    """Return the package's data set of a task. Its grader is `score_answer(answer, entry)`."""
    return importlib.import_module("reasoning_gym").create_dataset(task.name, size=size, seed=seed, **task.settings)


def part_of(text: str) -> Part:
    """Return which set a question belongs to, whatever its place in a data set."""
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 8
    return _PARTS[min(place // 2, 3)] if place < 6 else "rewards"


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
