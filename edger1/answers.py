"""Whether an answer says what was expected: numbers compared as numbers, lists by element, the rest by words."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"-?\d+")


def same_answer(given: str, expected: str) -> bool:
    """Whether two short answers are the same but for case, spaces, quotes, brackets, a full stop and leading zeros."""
    return bool(given.strip()) and _normal(given) == _normal(expected)


def _normal(answer: str) -> tuple[str, ...]:
    words = (word.strip(" '\"[]") for word in answer.strip().removesuffix(".").casefold().split(","))
    return tuple(str(int(word)) if _NUMBER.fullmatch(word) else re.sub(r"\s+", " ", word) for word in words)
