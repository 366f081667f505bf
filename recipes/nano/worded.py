"""Arithmetic told as little stories: having, giving, groups, sharing, buying, comparing. Steps are equations."""

from __future__ import annotations

from random import Random

from recipes.nano.problems import Problem, some
from recipes.nano.words import NAMES, OBJECTS, THINGS

_MORE = ("finds {n} more", "buys {n} more", "gets {n} more from {other}", "wins {n} more")
_FEWER = ("gives {n} to {other}", "loses {n}", "sells {n}", "gives away {n}")


def worded(rng: Random) -> Problem:
    """Draw one of the stories."""
    return rng.choice((_having, _having, _groups, _sharing, _buying, _together))(rng)


def _having(rng: Random) -> Problem:
    name, other = some(rng, NAMES, 2)
    things = rng.choice(THINGS)
    value = first = rng.randrange(3, 60)
    told, steps, codes = [], [], []
    for _ in range(rng.randrange(1, 4)):
        more = value < 4 or rng.random() < 0.5
        n = rng.randrange(1, 40 if more else min(value, 40))
        result = value + n if more else value - n
        steps.append(f"{value} {'+' if more else '-'} {n} = {result}")
        codes.append(n if more else -n)
        told.append(rng.choice(_MORE if more else _FEWER).format(n=n, other=other))
        value = result
    joined = told[0] if len(told) == 1 else f"{', '.join(told[:-1])} and then {told[-1]}"
    verb = rng.choice(("has", "starts with", "owns"))
    question = f"{name} {verb} {first} {things}. {name} {joined}. How many {things} does {name} have now?"
    return Problem("worded", f"having {first} {codes}", question, tuple(steps), str(value))


def _groups(rng: Random) -> Problem:
    groups, each = rng.randrange(2, 13), rng.randrange(2, 13)
    things = rng.choice(THINGS)
    holder = rng.choice(("boxes", "bags", "baskets", "shelves", "jars"))
    total = groups * each
    steps = [f"{groups} * {each} = {total}"]
    question = f"There are {groups} {holder} with {each} {things} each."
    change = rng.choice((0, 1, -1)) * rng.randrange(1, 20)
    if change > 0:
        question += f" {rng.choice(NAMES)} adds {change} {things}."
        steps.append(f"{total} + {change} = {total + change}")
    elif change < 0 and total + change >= 0:
        question += f" {rng.choice(NAMES)} takes {-change} {things} away."
        steps.append(f"{total} - {-change} = {total + change}")
    else:
        change = 0
    question += f" How many {things} are there{' now' if change else ' in all'}?"
    return Problem("worded", f"groups {groups} {each} {change}", question, tuple(steps), str(total + change))


def _sharing(rng: Random) -> Problem:
    name = rng.choice(NAMES)
    friends, each = rng.randrange(2, 13), rng.randrange(2, 13)
    things = rng.choice(THINGS)
    total = friends * each
    steps = [f"{total} / {friends} = {each}"]
    answer = each
    question = f"{name} shares {total} {things} equally among {friends} friends."
    if rng.random() < 0.5:
        had = rng.randrange(1, 20)
        question += f" Each friend already had {had}. How many {things} does each friend have now?"
        steps.append(f"{had} + {each} = {had + each}")
        answer = had + each
        return Problem("worded", f"sharing {total} {friends} {had}", question, tuple(steps), str(answer))
    question += f" How many {things} does each friend get?"
    return Problem("worded", f"sharing {total} {friends}", question, tuple(steps), str(answer))


def _buying(rng: Random) -> Problem:
    name = rng.choice(NAMES)
    a, b = some(rng, OBJECTS, 2)
    price_a, price_b = rng.randrange(2, 13), rng.randrange(2, 21)
    count = rng.randrange(2, 10)
    cost = price_a * count
    steps = [f"{count} * {price_a} = {cost}", f"{cost} + {price_b} = {cost + price_b}"]
    question = f"One {a} costs {price_a} coins and one {b} costs {price_b} coins."
    if rng.random() < 0.5:
        question += f" How many coins do {count} of the first and one {b} cost together?"
        return Problem("worded", f"buying {price_a} {count} {price_b}", question, tuple(steps), str(cost + price_b))
    money = cost + price_b + rng.randrange(0, 40)
    question += f" {name} has {money} coins and buys {count} of the first and one {b}. How many coins are left?"
    left = money - cost - price_b
    steps.append(f"{money} - {cost + price_b} = {left}")
    return Problem("worded", f"buying {price_a} {count} {price_b} of {money}", question, tuple(steps), str(left))


def _together(rng: Random) -> Problem:
    name, other = some(rng, NAMES, 2)
    things = rng.choice(THINGS)
    first = rng.randrange(5, 60)
    change = rng.choice((rng.randrange(1, 30), -rng.randrange(1, first)))
    second = first + change
    steps = [f"{first} {'+' if change > 0 else '-'} {abs(change)} = {second}"]
    relation = f"{abs(change)} {'more' if change > 0 else 'fewer'}"
    if rng.random() < 0.2:
        times = rng.randrange(2, 5)
        second, change, relation = first * times, 1000 * times, f"{times} times as many"
        steps = [f"{first} * {times} = {second}"]
    question = f"{name} has {first} {things}. {other} has {relation}{'' if 'as many' in relation else ' than ' + name}."
    if rng.random() < 0.6:
        question += f" How many {things} do they have together?"
        steps.append(f"{first} + {second} = {first + second}")
        return Problem("worded", f"together {first} {change}", question, tuple(steps), str(first + second))
    question += f" How many {things} does {other} have?"
    return Problem("worded", f"other {first} {change}", question, tuple(steps), str(second))
