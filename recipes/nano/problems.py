"""A problem: a question, the steps to its answer, and what decides whether it is held out.

The split is decided by a hash of the problem's key and not of its wording: a problem that is held out is held out in
every wording, and no form of it (chat, plain text, without thoughts) is ever trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

HELD_OUT_ONE_IN = 32

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """One problem of a kind. `key` names it whatever the wording; `steps` is what stands in the thoughts."""

    kind: str
    key: str
    question: str
    steps: tuple[str, ...]
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether this problem is kept from training."""
        digest = hashlib.sha256(f"{self.kind}\n{self.key}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0

    def messages(self) -> list[dict[str, str]]:
        """Return the problem as a chat, thoughts shown."""
        return [
            {"role": "user", "content": self.question},
            {"role": "assistant", "content": f"<think>\n{self.thoughts}\n</think>\n\n{self.answer}"},
        ]

    @property
    def thoughts(self) -> str:
        """The steps as lines."""
        return "\n".join(self.steps)

    def text(self, rng: Random) -> str:
        """Return the problem as plain text, in one of several layouts."""
        return rng.choice(
            (
                f"Question: {self.question}\nSolution:\n{self.thoughts}\nAnswer: {self.answer}",
                f"{self.question}\n{self.thoughts}\nSo the answer is {self.answer}.",
                f"Problem: {self.question}\n{self.thoughts}\nResult: {self.answer}",
            )
        )


def joined(things: Sequence[object], last: str = "and") -> str:
    """Return "a, b and c"."""
    words = [str(thing) for thing in things]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def listed(things: Sequence[object]) -> str:
    """Return "a, b, c"."""
    return ", ".join(str(thing) for thing in things)


def some(rng: Random, things: Sequence[T], count: int) -> list[T]:
    """Draw `count` different things."""
    return rng.sample(things, count)
