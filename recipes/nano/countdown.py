"""Countdown: make a target out of three numbers, each used once. The steps try every combination in a fixed order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from recipes.nano.problems import Problem, joined, listed

_LONGEST_THOUGHTS = 270  # characters; digits, signs and the words between them are a token each

_OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def _attempts(numbers: list[int]) -> Iterator[tuple[int, str, int, str, int]]:
    """Yield (x, sign, y, sign, z), to be read from left to right, in the order in which they are tried."""
    x, y, z = sorted(numbers, reverse=True)
    yield from (
        (x, "+", y, "+", z),
        (x, "+", y, "-", z),
        (x, "+", z, "-", y),
        (y, "+", z, "-", x),
        (x, "-", y, "-", z),
    )
    for a, b, c in ((x, y, z), (x, z, y), (y, z, x)):
        yield a, "*", b, "+", c
        yield a, "*", b, "-", c


def countdown(rng: Random) -> Problem:
    """Draw three numbers and a target that can be reached, in so many steps that the whole fits a row of 256 tokens."""
    while len((problem := _countdown(rng)).thoughts) > _LONGEST_THOUGHTS:
        pass
    return problem


def _countdown(rng: Random) -> Problem:
    numbers = (
        [rng.randrange(1, 31) for _ in range(3)] if rng.random() < 0.5 else [rng.randrange(2, 13) for _ in range(3)]
    )
    reachable = []
    for a, one, b, two, c in _attempts(numbers):
        result = _OPERATIONS[two](_OPERATIONS[one](a, b), c)
        if result > 0 and result <= 160:
            reachable.append(result)
    target = rng.choice(reachable)
    steps, answer = [f"{listed(sorted(numbers, reverse=True))} to {target}"], ""
    for a, one, b, two, c in _attempts(numbers):
        middle = _OPERATIONS[one](a, b)
        result = _OPERATIONS[two](middle, c)
        shown = f"{middle} {two} {c} < 0" if result < 0 else f"{middle} {two} {c} = {result}"
        if middle < 0:
            steps.append(f"{a} {one} {b} < 0, no")
            continue
        found = result == target
        steps.append(f"{a} {one} {b} = {middle}, {shown}, {'yes' if found else 'no'}")
        if found:
            answer = f"{a} {one} {b} {two} {c}"
            break
    question = rng.choice(
        (
            f"Make {target} from {joined(numbers)}, using each number once.",
            f"Use {joined(numbers)} once each with +, - and * to get {target}.",
            f"Countdown: numbers {listed(numbers)}, target {target}. Find an expression.",
        )
    )
    return Problem("countdown", f"{sorted(numbers)} {target}", question, tuple(steps), answer)


def reaches(expression: str, numbers: list[int], target: int) -> bool:
    """Whether an expression of + - * (and no brackets) uses exactly these numbers and makes the target."""
    if not re.fullmatch(r"\d+( ?[-+*] ?\d+)*", expression.strip()):
        return False
    parts = re.findall(r"\d+|[-+*]", expression)
    if sorted(map(int, parts[::2])) != sorted(numbers):
        return False
    terms, signs = [int(parts[0])], []
    for sign, number in zip(parts[1::2], parts[2::2], strict=True):
        if sign == "*":
            terms[-1] *= int(number)
        else:
            signs.append(sign)
            terms.append(int(number))
    value = terms[0]
    for sign, term in zip(signs, terms[1:], strict=True):
        value += term if sign == "+" else -term
    return value == target
