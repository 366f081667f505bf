"""Tasks of reasoning-gym (Apache-2.0) that this size of model can do, with steps, which the package does not give.

Questions and answers are the package's own. It is a dependency of this recipe only: `pip install reasoning-gym`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from random import Random
from typing import Any

from recipes.nano.problems import Problem

_AT_ONCE = 1000

Entry = Mapping[str, Any]


def available() -> bool:
    """Whether reasoning-gym is installed."""
    return importlib.util.find_spec("reasoning_gym") is not None


def _running(terms: list[int]) -> Iterator[str]:
    total = terms[0]
    for term in terms[1:]:
        yield f"{total} {'+' if term >= 0 else '-'} {abs(term)} = {total + term}"
        total += term


def _legs(entry: Entry) -> list[str]:
    legs_of = importlib.import_module("reasoning_gym.arithmetic.leg_counting").ANIMALS
    animals: dict[str, int] = entry["metadata"]["animals"]
    steps = [f"{animal}: {n} * {legs_of[animal]} = {n * legs_of[animal]}" for animal, n in animals.items()]
    return steps + list(_running([n * legs_of[animal] for animal, n in animals.items()]))


def _chain(entry: Entry) -> list[str]:
    words = entry["metadata"]["expression"].split()
    terms = [int(words[0])]
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        terms.append(int(number) if sign == "+" else -int(number))
    return list(_running(terms))


def _angles(entry: Entry) -> list[str]:
    known = [int(angle) for angle in entry["metadata"]["known_angles"]]
    total = int(entry["metadata"]["total_interior_sum"])
    sides = entry["metadata"]["n_sides"]
    return [
        f"{sides} - 2 = {sides - 2}, {sides - 2} * 180 = {total}",
        *_running(known),
        f"{total} - {sum(known)} = {total - sum(known)}",
    ]


def _gcd(entry: Entry) -> list[str]:
    a, b = sorted(entry["metadata"]["numbers"], reverse=True)
    steps = []
    while b:
        steps.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return [*steps, f"the divisor is {a}"]


def _primes(entry: Entry) -> list[str]:
    rest = entry["metadata"]["number"]
    steps = []
    for factor in entry["metadata"]["factors"]:
        steps.append(f"{rest} / {factor} = {rest // factor}")
        rest //= factor
    return steps


def _filtering(entry: Entry) -> list[str]:
    told = entry["metadata"]
    limit, operation = told["filter_value"], told["operation"]
    steps = []
    for number in told["original_numbers"]:
        sign = "=" if float(number) == float(limit) else ">" if float(number) > float(limit) else "<"
        keep = (
            sign in {"keep_larger": ">", "keep_smaller": "<", "remove_larger": "<=", "remove_smaller": ">="}[operation]
        )
        steps.append(f"{number} {sign} {limit}, {'keep' if keep else 'drop'}")
    return steps


_TASKS: dict[str, tuple[str, dict[str, Any], Callable[[Entry], list[str]]]] = {
    "gym legs": ("leg_counting", {"min_animals": 2, "max_animals": 3, "min_instances": 1, "max_instances": 9}, _legs),
    "gym sums": ("chain_sum", {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}, _chain),
    "gym angles": ("simple_geometry", {"min_sides": 3, "max_sides": 4, "min_angle": 20, "max_angle": 80}, _angles),
    "gym gcd": ("gcd", {"min_value": 2, "max_value": 100}, _gcd),
    "gym primes": ("prime_factorization", {"min_value": 2, "max_value": 500}, _primes),
    "gym filtering": (
        "number_filtering",
        {"min_numbers": 3, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0, "min_value": 0.0, "max_value": 99.0},
        _filtering,
    ),
}
KINDS = tuple(_TASKS)


class Gym:
    """One task: a problem at each call, out of datasets whose seeds come from `seed`."""

    def __init__(self, kind: str, seed: int) -> None:
        self._kind = kind
        self._entries = self._drawn(seed)

    def _drawn(self, seed: int) -> Iterator[Entry]:
        create = importlib.import_module("reasoning_gym").create_dataset
        name, settings, _ = _TASKS[self._kind]
        for block in count():
            # Seeds a million apart: the package adds an entry's number to its seed.
            yield from create(name, size=_AT_ONCE, seed=(seed * 1000 + block) * 1_000_003, **settings)

    def __call__(self, rng: Random) -> Problem:
        """Return the next problem; `rng` is not needed, the package has its own."""
        entry = next(self._entries)
        question = "\n".join(line.strip() for line in entry["question"].splitlines() if line.strip())
        steps = tuple(_TASKS[self._kind][2](entry))
        return Problem(self._kind, question, question, steps, str(entry["answer"]))
