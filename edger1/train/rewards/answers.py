"""Is the final answer the right one: as text, or as a number."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import Any

from edger1.errors import UsageError
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.extract import final_answer

_MOST_CHARACTERS = 400
_NUMBER = re.compile(
    r"""(?P<sign>[-+]?)[ ]?(?P<currency>[$€£¥]?)[ ]?
        (?:(?P<whole>\d+)[ ](?P<mixed_top>\d+)/(?P<mixed_bottom>\d+)
          |(?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)
          |(?P<digits>\d[\d.,_' ]*\d|\d|[.]\d+)(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\d))?)
        [ ]?(?P<percent>%?)""",
    re.VERBOSE,
)
_GROUPED = re.compile(r"\d{1,3}([,_' ])\d{3}(?:\1\d{3})*")


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
    answer = _plain(final_answer(completion.answer), case)
    return float(any(answer == _plain(right, case) for right in right_answers(completion, column)))


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


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """Return the last number of a text, and whether a percent sign follows it; None where there is none."""
    text = _unlatexed(text[-_MOST_CHARACTERS:])
    found = None
    for match in _NUMBER.finditer(text):
        before = text[: match.start()]
        # The minus of "3-4" or "x-4" is an operator; only what stands alone is a sign.
        signed = match["sign"] == "-" and not re.search(r"[\w)\]]$", before)
        if (value := _value(match)) is not None:
            found = (-value if signed else value), bool(match["percent"])
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    for top, bottom, whole in (("mixed_top", "mixed_bottom", "whole"), ("top", "bottom", None)):
        if match[top] is not None:
            if int(match[bottom]) == 0:
                return None
            return int(match[whole] if whole else 0) + Fraction(int(match[top]), int(match[bottom]))
    try:
        number = Fraction(_undivided(match["digits"]))
    except ValueError:
        return None
    return number * Fraction(10) ** int(match["exponent"] or 0)


def _undivided(digits: str) -> str:
    """Take separators of thousands out of a number, and make its decimal mark a point."""
    comma, point = digits.rfind(","), digits.rfind(".")
    mark = "," if comma > point else "."
    if comma >= 0 and point >= 0:
        whole, _, rest = digits.rpartition(mark)
        return f"{re.sub(r'[^0-9]', '', whole)}.{rest}"
    if _GROUPED.fullmatch(digits) or digits.count(mark) > 1:
        return re.sub(r"[^0-9]", "", digits)
    if comma >= 0:
        whole, _, rest = digits.partition(",")
        # 1,234 is a thousand and more; a comma with other than three digits after it is a decimal comma.
        return re.sub(r"[^0-9]", "", digits) if len(rest) == 3 and len(whole) <= 3 else f"{whole}.{rest}"
    whole, dot, rest = digits.partition(".")
    grouped = _GROUPED.fullmatch(whole)
    # Blanks between numbers that are no groups of three: the last one counts.
    return f"{re.sub(r'[^0-9]', '', whole) if grouped else re.split(r'[^0-9]', whole)[-1]}{dot}{rest}"


def _close(found: tuple[Fraction, bool], right: tuple[Fraction, bool], relative: float, absolute: float) -> bool:
    (value, percent), (wanted, wanted_percent) = found, right
    readings = [value] if percent == wanted_percent else [value, value / 100 if percent else value * 100]
    return any(_within(reading, wanted, relative, absolute) for reading in readings)


def _within(value: Fraction, wanted: Fraction, relative: float, absolute: float) -> bool:
    room = max(Fraction(relative) * abs(wanted), Fraction(absolute))
    return abs(value - wanted) <= room


def _unlatexed(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-").replace("⁄", "/")
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", text)
    text = re.sub(r"\\([%$])", r"\1", text)
    text = re.sub(r"\\(?:[,;!: ]|quad\b|text\b|mathrm\b)|\{,\}", lambda m: "," if m[0] == "{,}" else "", text)
    return re.sub(r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))", ",", text)


def _plain(text: str, case: bool) -> str:
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    quotes = "\"'`“”‘’ "
    text = text.strip(quotes).rstrip(".").strip(quotes)
    return text if case else text.casefold()


def vote_key(answer: str) -> str | None:
    """Return what equal final answers have in common: a number's value or the plain text; None where there is none."""
    text = _plain(final_answer(answer), case=False)
    if not any(character.isalpha() for character in text) and (found := last_number(text)) is not None:
        return f"{found[0]}{'%' * found[1]}" if _NUMBER.fullmatch(_unlatexed(text).strip()) else text
    return text or None
