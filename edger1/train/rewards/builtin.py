"""The rewards that come along, by name, and how each is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edger1.train.rewards import answers, code, form, gym, language, length, maths

Score = Callable[..., float]


@dataclass(frozen=True)
class Builtin:
    """A reward that comes along."""

    function: Score
    place: str = "here"
    """"here": in this process, for those that cannot hang. "worker": in the worker process. "threads": here, several at
    once, for those that wait for a process of their own."""
    judges: bool = False
    """Whether 1 means that the answer is right."""


BUILTIN: dict[str, Builtin] = {
    "exact": Builtin(answers.exact, judges=True),
    "numeric": Builtin(answers.numeric, judges=True),
    "maths": Builtin(maths.maths, "worker", judges=True),
    "gym": Builtin(gym.gym, "worker", judges=True),
    "code": Builtin(code.code, "threads", judges=True),
    "schema": Builtin(form.schema, "worker", judges=True),
    "format": Builtin(form.form),
    "length": Builtin(length.length),
    "overlong": Builtin(length.overlong),
    "cosine": Builtin(length.cosine),
    "language": Builtin(language.language),
}
