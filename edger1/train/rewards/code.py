"""Does the program in the answer pass its tests."""

from __future__ import annotations

from edger1.errors import UsageError
from edger1.final_answers import fenced
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.sandbox import Limits, run


def code(
    completion: Completion,
    *,
    column: str = "tests",
    partial: bool = False,
    seconds: float = 10.0,
    memory_mb: int = 512,
) -> float:
    """Give 1 where the program in the answer passes all of the row's tests, else 0; with `partial`, their share.

    The program is the last fenced block of Python, else the last fenced block, else the whole answer. Tests are as
    `edger1.train.rewards.sandbox.run` takes them; each run of the program has `seconds` and `memory_mb`.
    """
    if column not in completion.columns:
        there = ", ".join(map(str, completion.columns)) or "none"
        raise UsageError(
            f'{completion.where or "The row"} has no column "{column}" with tests; its columns: {there}. Name another '
            "one with column=NAME."
        )
    program = fenced(completion.answer, "python", "py", "python3") or completion.answer
    if not program.strip():
        return 0.0
    limits = Limits(wall_s=seconds, cpu_s=max(1.0, seconds), memory_bytes=memory_mb * 2**20)
    result = run(program, completion.columns[column], limits)
    return result.share if partial else float(result.passed == result.total)
