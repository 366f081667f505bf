"""How a reward function is called: with the completion, or with prompt, answer and the row's columns by name."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

from edger1.errors import UsageError
from edger1.train.rewards.completion import Completion

REFERENCE = "reference"
"""What the row's own column "answer" is called in the simple form, where `answer` is the model's."""


def caller(function: Callable[..., Any], options: dict[str, Any], what: str) -> Callable[[Completion], Any]:
    """Return a user's function as one of a completion.

    `def reward(completion)` gets the Completion; `def reward(prompt, answer, ...)` gets the text of the last user
    message, the model's answer without its thought, and those of the row's columns that it has parameters for, or all
    of them where it has **columns. `options` are passed by name. Raises UsageError for other shapes.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise UsageError(f"{what} is no function that can be looked into; write one with def.") from None
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    if unknown := [] if anything else sorted(options.keys() - set(names)):
        raise UsageError(f"{what} has no parameter {', '.join(unknown)}; its parameters: {', '.join(names)}.")
    positional = [p for p in named if p.kind is not p.KEYWORD_ONLY]
    if names[:2] == ["prompt", "answer"]:
        return _simple(function, named[2:], anything, options)
    if positional and (positional[0].name == "completion" or _takes_completion(positional[0])):
        others = [p for p in named[1:] if p.default is p.empty and p.name not in options]
        if not others:
            return lambda completion: function(completion, **options)
        raise UsageError(f"{what} needs {others[0].name}; give it as an option, or a default in the function.")
    raise UsageError(
        f"{what} takes ({', '.join(names)}); expected def reward(completion) or def reward(prompt, answer, **columns)."
    )


def _takes_completion(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is Completion or str(parameter.annotation).endswith("Completion")


def _simple(
    function: Callable[..., Any], more: list[inspect.Parameter], anything: bool, options: dict[str, Any]
) -> Callable[[Completion], Any]:
    needed = [p.name for p in more if p.default is p.empty and p.name not in options]
    taken = {p.name for p in more}

    def call(completion: Completion) -> Any:
        columns = {key: value for key, value in completion.columns.items() if key not in ("prompt", "answer")}
        if "answer" in completion.columns:
            columns[REFERENCE] = completion.columns["answer"]
        if missing := [name for name in needed if name not in columns]:
            there = ", ".join(columns) or "none"
            raise LookupError(f"the row has no column {', '.join(missing)} (it has: {there})")
        columns = {key: value for key, value in columns.items() if (anything or key in taken) and key.isidentifier()}
        return function(completion.question(), completion.answer, **(columns | options))

    return call


def as_number(value: Any) -> float:
    """Return a reward's value as a float; raises ValueError that says what it was, where it is no finite number."""
    if value is None:
        raise ValueError("gave None instead of a number; does every branch return one?")
    # NumPy's and MLX's scalars have item().
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if not isinstance(value, numbers.Real):
        raise ValueError(f"gave {value!r:.80} ({type(value).__name__}) instead of a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"gave {number}, which is no finite number")
    return number
