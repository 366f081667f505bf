"""Is the completion in the form that was asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from edger1.errors import UsageError
from edger1.final_answers import boxed, fenced
from edger1.train.rewards.completion import THINK, Completion


def form(
    completion: Completion, *, think: bool = True, answer: bool = False, boxed: bool = False, partial: bool = False
) -> float:
    """Give 1 where every part asked for is there, else 0; with `partial`, the share of the parts.

    think: the completion begins with `<think>`, has it and `</think>` once, and an answer after it. answer: one
    `<answer>...</answer>` that is not empty, after the thought, with nothing after it. boxed: the answer has a
    `\\boxed{...}`. (DeepSeek-R1's format reward, arXiv:2501.12948, is think and answer.)
    """
    checks = [check(completion) for wanted, check in ((think, _thinks), (answer, _tags), (boxed, _boxes)) if wanted]
    if not checks:
        raise UsageError("format with think, answer and boxed all off asks for nothing.")
    return sum(checks) / len(checks) if partial else float(all(checks))


def _thinks(completion: Completion) -> bool:
    text = completion.text
    once = text.count(THINK[0]) == 1 and text.count(THINK[1]) == 1
    return once and text.lstrip().startswith(THINK[0]) and bool(completion.thinking) and bool(completion.answer)


def _tags(completion: Completion) -> bool:
    answer = completion.answer
    if answer.count("<answer>") != 1 or answer.count("</answer>") != 1 or not answer.endswith("</answer>"):
        return False
    return bool(answer.partition("<answer>")[2].removesuffix("</answer>").strip())


def _boxes(completion: Completion) -> bool:
    return bool(boxed(completion.answer))


def schema(completion: Completion, *, file: str = "", column: str = "schema") -> float:
    """Give 1 where the answer is JSON that a JSON schema accepts, else 0.

    The JSON is the last fenced block, or else the whole answer. The schema is read from `file`, or else from the row's
    column. References to other documents are not followed.
    """
    try:
        import jsonschema
        from referencing import Registry
        from referencing.exceptions import Unresolvable
    except ImportError:
        raise UsageError("The reward schema needs jsonschema: pip install 'edger1[train]'") from None

    if file:
        wanted = _read_schema(Path(file))
    elif column in completion.columns:
        wanted = completion.columns[column]
    else:
        raise UsageError(
            f'{completion.where or "The row"} has no column "{column}" with a JSON schema; name a file with '
            "schema:file=FILE.json, or another column."
        )
    if isinstance(wanted, str):
        wanted = json.loads(wanted)
    kind = jsonschema.validators.validator_for(wanted)
    try:
        kind.check_schema(wanted)
    except jsonschema.SchemaError as error:
        raise UsageError(f"{file or completion.where or 'The row'} has no valid JSON schema: {error.message}") from None
    body = fenced(completion.answer, "json") or completion.answer
    try:
        value: Any = json.loads(body, parse_constant=_refuse)
    except ValueError:
        return 0.0
    try:
        return float(kind(wanted, registry=Registry()).is_valid(value))
    except Unresolvable as error:
        raise UsageError(f"The JSON schema refers to {error.ref}, which is not in it.") from None


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


@lru_cache(maxsize=8)
def _read_schema(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
        json.loads(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    except ValueError as error:
        raise UsageError(f"{path} is no JSON: {error}.") from None
    return text
