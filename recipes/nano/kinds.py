"""All kinds of problems: who makes them, how often, and how a reply is graded."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from edger1.answers import same_answer
from recipes.nano import arithmetic, calendars, gym, lists
from recipes.nano.countdown import countdown, reaches
from recipes.nano.problems import Problem
from recipes.nano.stories import story
from recipes.nano.worded import worded

Make = Callable[[Random], Problem]


@dataclass(frozen=True)
class Kind:
    """One kind of problem. `weight` is its share of documents among all weights.

    `repeats` is how often one problem may come, each time in a wording of its own: more than once where there are few.
    """

    make: Make
    weight: float
    repeats: int = 1


def kinds(seed: int) -> dict[str, Kind]:
    """Return every kind by name; those of reasoning-gym only where it is installed."""
    found = {
        "add": Kind(arithmetic.add, 8),
        "subtract": Kind(arithmetic.subtract, 8),
        "multiply": Kind(arithmetic.multiply, 7, 4),
        "divide": Kind(arithmetic.divide, 6, 3),
        "chain": Kind(arithmetic.chain, 8),
        "sequence": Kind(arithmetic.sequence, 5, 2),
        "worded": Kind(worded, 10, 3),
        "compare": Kind(lists.compare, 6),
        "sort numbers": Kind(lists.sort_numbers, 7),
        "sort words": Kind(lists.sort_words, 6),
        "count letters": Kind(lists.count_letters, 3, 6),
        "count things": Kind(lists.count_things, 5),
        "reverse": Kind(lists.reverse, 5, 6),
        "relations": Kind(lists.relations, 6),
        "weekday": Kind(calendars.weekday, 3, 6),
        "date": Kind(calendars.date, 6, 2),
        "clock": Kind(calendars.clock, 5, 2),
        "countdown": Kind(countdown, 8, 3),
        "story": Kind(story, 10),
    }
    if gym.available():
        found |= {name: Kind(gym.Gym(name, seed), 1.5, 2) for name in gym.KINDS}
    return found


def answer_of(reply: str) -> str:
    """Return what a reply answers: what stands after the thoughts, without a full stop at its end.

    A reply that never ended its thoughts has no answer.
    """
    before, closed, after = reply.rpartition("</think>")
    text = after if closed else ("" if "<think>" in before + after else after)
    return text.strip().removesuffix(".").strip()


def grade(kind: str, key: str, expected: str, reply: str) -> bool:
    """Whether a reply (thoughts included or not) to the problem `key` of a kind is right.

    Numbers are compared as numbers, lists by element, countdown by what the expression makes, all else by its words.
    """
    given = answer_of(reply)
    if kind == "countdown":
        *numbers, target = map(int, re.findall(r"\d+", key))
        return bool(given) and reaches(given, numbers, target)
    return same_answer(given, expected)
