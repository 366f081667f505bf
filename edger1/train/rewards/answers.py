"""Is the final answer the right one: as text, or as a number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from edger1.errors import UsageError
from edger1.final_answers import final_answer, last_number, plain
from edger1.train.rewards.completion import Completion


def right_answers(completion: Completion, column: str) -> list[str]:
    """Return the row's right answer, or each of them where the column is a list.

    Raises UsageError where the row has no such column.
    """
    if column not in completion.columns or completion.columns[column] is None:
        there = ", ".join(map(str, completion.columns)) or "none"
        raise UsageError(
            f'{completion.where or "The row"} has no column "{column}" with the right answer; its columns: {there}. '
            "Name another one with column=NAME."
        )
    value: Any = completion.columns[column]
    return [str(each) for each in value] if isinstance(value, list | tuple) else [str(value)]


def exact(completion: Completion, *, column: str = "answer", case: bool = False) -> float:
    """Give 1 where the final answer equals the right one, blanks, a final full stop and quotes apart; else 0."""
    answer = plain(final_answer(completion.answer), case)
    return float(any(answer == plain(right, case) for right in right_answers(completion, column)))


def numeric(completion: Completion, *, column: str = "answer", relative: float = 1e-6, absolute: float = 0.0) -> float:
    """Give 1 where the final answer's number equals the right one within a tolerance; else 0.

    The number is the whole final answer, or else the last number in it. It may have thousands separators, a currency
    sign, a decimal comma, a fraction (3/4, 1 3/4, \\frac{3}{4}), an exponent, or a percent sign; where only one side
    has a percent sign, 50% is both 50 and 0.5.
    """
    found = last_number(final_answer(completion.answer))
    if found is None:
        return 0.0
    rights = right_answers(completion, column)
    numbers = [last_number(right) for right in rights]
    if None in numbers:
        raise UsageError(
            f"{completion.where or 'The row'} has {rights[numbers.index(None)]!r:.80} as its right answer; expected a "
            "number. Use exact or maths for others."
        )
    return float(any(_close(found, right, relative, absolute) for right in numbers if right is not None))


def _close(found: tuple[Fraction, bool], right: tuple[Fraction, bool], relative: float, absolute: float) -> bool:
    (value, percent), (wanted, wanted_percent) = found, right
    readings = [value] if percent == wanted_percent else [value, value / 100 if percent else value * 100]
    return any(_within(reading, wanted, relative, absolute) for reading in readings)


def _within(value: Fraction, wanted: Fraction, relative: float, absolute: float) -> bool:
    room = max(Fraction(relative) * abs(wanted), Fraction(absolute))
    return abs(value - wanted) <= room
