"""Problems of plain numbers: column sums, products, quotients, chains of operations, sequences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from random import Random

from recipes.nano.problems import Problem, listed


def _size(rng: Random) -> int:
    """Draw a number of one to three digits, each length about as often."""
    return rng.randrange(*rng.choice(((0, 10), (10, 100), (10, 100), (100, 1000))))


def columns_of_sum(a: int, b: int) -> Iterator[str]:
    """Yield the steps of adding two numbers digit by digit, from the right."""
    left, right, carry = str(a)[::-1], str(b)[::-1], 0
    for place in range(max(len(left), len(right))):
        digits = [text[place] for text in (left, right) if place < len(text)]
        terms = digits + ([str(carry)] if carry else [])
        total = sum(map(int, terms))
        carry = total // 10
        step = f"{' + '.join(terms)} = {total}" if len(terms) > 1 else f"bring down {total}"
        yield f"{step}, write {total % 10}, carry {carry}" if carry else step
    if carry:
        yield f"bring down {carry}"


def columns_of_difference(a: int, b: int) -> Iterator[str]:
    """Yield the steps of subtracting b from a (a >= b) digit by digit, from the right."""
    upper, lower, borrow = str(a)[::-1], str(b)[::-1], 0
    for place, digit in enumerate(upper):
        below = int(lower[place]) if place < len(lower) else 0
        top, taken = int(digit), below + borrow
        shown = f"{below} - {borrow}" if borrow else f"{below}"
        if top < taken:
            yield f"{digit} is too small, {top + 10} - {shown} = {top + 10 - taken}, borrow 1"
            borrow = 1
        else:
            yield f"{digit} - {shown} = {top - taken}"
            borrow = 0


def add(rng: Random) -> Problem:
    """Two numbers of up to three digits."""
    a, b = _size(rng), _size(rng)
    question = rng.choice(
        (f"What is {a} + {b}?", f"Add {a} and {b}.", f"{a} + {b} = ?", f"Find the sum of {a} and {b}.")
    )
    steps = tuple(dict.fromkeys((*columns_of_sum(a, b), f"{a} + {b} = {a + b}")))
    return Problem("add", f"{min(a, b)} {max(a, b)}", question, steps, str(a + b))


def subtract(rng: Random) -> Problem:
    """A number of up to three digits less a smaller one."""
    a, b = sorted((_size(rng), _size(rng)), reverse=True)
    question = rng.choice(
        (f"What is {a} - {b}?", f"Subtract {b} from {a}.", f"{a} - {b} = ?", f"Take {b} away from {a}.")
    )
    steps = tuple(dict.fromkeys((*columns_of_difference(a, b), f"{a} - {b} = {a - b}")))
    return Problem("subtract", f"{a} {b}", question, steps, str(a - b))


def product_steps(a: int, b: int) -> Iterator[str]:
    """Yield the steps of a times b, b having one digit: each digit of a apart, then added up."""
    parts = [int(digit) * 10**place for place, digit in reversed(list(enumerate(reversed(str(a)))))]
    parts = [part for part in parts if part] or [0]
    for part in parts:
        yield f"{part} * {b} = {part * b}"
    total = parts[0] * b
    for part in parts[1:]:
        yield f"{total} + {part * b} = {total + part * b}"
        total += part * b


def multiply(rng: Random) -> Problem:
    """Up to three digits times one, or two times two small ones."""
    if rng.random() < 0.75:
        a, b = rng.randrange(2, rng.choice((10, 100, 1000))), rng.randrange(2, 10)
        steps = list(product_steps(a, b))
    else:
        a, b = rng.randrange(11, 100), rng.randrange(11, 30)
        tens, ones = b // 10 * 10, b % 10
        steps = [f"{b} = {tens} + {ones}", f"{a} * {tens} = {a * tens}", *product_steps(a, ones)]
        steps.append(f"{a * tens} + {a * ones} = {a * b}")
    question = rng.choice((f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"{a} * {b} = ?", f"What is {a} times {b}?"))
    return Problem("multiply", f"{min(a, b)} {max(a, b)}", question, tuple(steps), str(a * b))


def divide(rng: Random) -> Problem:
    """Quotient and remainder, by long division."""
    b = rng.randrange(2, 13)
    a = rng.randrange(b, rng.choice((100, 1000)))
    steps: list[str] = []
    rest, quotient = 0, ""
    for digit in str(a):
        rest = rest * 10 + int(digit)
        times = rest // b
        if quotient or times:
            steps.append(f"{rest} / {b}: {times} * {b} = {times * b}, {rest} - {times * b} = {rest - times * b}")
            quotient += str(times)
        rest -= times * b
    question = rng.choice(
        (
            f"Divide {a} by {b}. Give the quotient and the remainder.",
            f"What is {a} divided by {b}, with the remainder?",
            f"{a} / {b} = ? Give the remainder too.",
        )
    )
    return Problem("divide", f"{a} {b}", question, tuple(steps), f"{a // b} remainder {a % b}")


def chain(rng: Random) -> Problem:
    """Three to six operations one after the other, told in words or as an expression of sums."""
    count = rng.randrange(3, 7)
    if rng.random() < 0.4:
        return _expression(rng, count)
    value = first = rng.randrange(1, 30)
    told: list[str] = []
    steps: list[str] = []
    codes: list[str] = []
    for _ in range(count):
        options = ["add"]
        if value > 3:
            options.append("subtract")
        if value < 60:
            options += ["double", "triple"] if value < 34 else ["double"]
        if value and value % 2 == 0:
            options.append("halve")
        operation = rng.choice(options)
        if operation in ("add", "subtract"):
            n = rng.randrange(1, 25 if operation == "add" else min(value, 25))
            result = value + n if operation == "add" else value - n
            told.append(f"{operation} {n}")
            steps.append(f"{value} {'+' if operation == 'add' else '-'} {n} = {result}")
        else:
            sign, n = {"double": ("*", 2), "triple": ("*", 3), "halve": ("/", 2)}[operation]
            result = value * n if sign == "*" else value // n
            told.append(f"{operation} it")
            steps.append(f"{value} {sign} {n} = {result}")
        codes.append(told[-1])
        value = result
    listing = ", ".join(told[:-1]) + f" and {told[-1]}"
    question = rng.choice(
        (
            f"Start with {first}. Then {listing}. What do you get?",
            f"Take {first}, then {listing}. What is the result?",
            f"I think of {first}. I {listing}. Which number do I have?",
        )
    )
    return Problem("chain", f"{first} {codes}", question, tuple(steps), str(value))


def _expression(rng: Random, count: int) -> Problem:
    value = rng.randrange(1, 50)
    shown, steps = str(value), []
    for _ in range(count - 1):
        n = rng.randrange(1, 40)
        sign = rng.choice("+-") if value >= n else "+"
        result = value + n if sign == "+" else value - n
        steps.append(f"{value} {sign} {n} = {result}")
        shown, value = f"{shown} {sign} {n}", result
    question = rng.choice((f"What is {shown}?", f"Calculate {shown}.", f"{shown} = ?"))
    return Problem("chain", shown, question, tuple(steps), str(value))


def sequence(rng: Random) -> Problem:
    """The next number of a sequence with a constant step, or a constant factor."""
    length = rng.randrange(4, 7)
    if rng.random() < 0.8:
        step = rng.choice((-1, 1)) * rng.randrange(1, 26)
        first = rng.randrange(0, 100) if step > 0 else rng.randrange(-step * length, -step * length + 100)
        terms = [first + step * i for i in range(length + 1)]
        sign, size = ("+", step) if step > 0 else ("-", -step)
        checks = [f"{a} {sign} {size} = {b}" for a, b in itertools.pairwise(terms)]
    else:
        factor, first, length = rng.randrange(2, 5), rng.randrange(1, 12), 4
        terms = [first * factor**i for i in range(length + 1)]
        sign, size = "*", factor
        checks = [f"{a} * {factor} = {b}" for a, b in itertools.pairwise(terms)]
    steps = (*checks[:2], f"the rule is {sign} {size}", f"{terms[-2]} {sign} {size} = {terms[-1]}")
    shown = listed(terms[:-1])
    question = rng.choice(
        (
            f"What comes next: {shown}, ?",
            f"Find the next number: {shown}.",
            f"The sequence is {shown}. Which number follows?",
        )
    )
    return Problem("sequence", shown, question, steps, str(terms[-1]))
