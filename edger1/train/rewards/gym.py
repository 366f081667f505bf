"""Tasks of reasoning-gym (Apache-2.0): generated questions, and the package's own scoring of answers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from edger1.errors import UsageError
from edger1.final_answers import final_answer
from edger1.train.rewards.completion import Completion


def dataset(task: str, *, size: int = 1, seed: int = 0, options: Mapping[str, Any] | None = None) -> Any:
    """Create the generator of a task; an index gives an entry with question, answer and metadata.

    Raises UsageError for a task or an option that the package does not have, and where the package is missing.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UsageError("Tasks named gym:... need reasoning-gym: pip install 'edger1[train]'") from None

    if task not in DATASETS:
        from difflib import get_close_matches

        close = get_close_matches(task, DATASETS, n=4, cutoff=0.5)
        like = f"the nearest are {', '.join(close)}" if close else f"there are {', '.join(sorted(DATASETS)[:12])}, ..."
        raise UsageError(f'reasoning-gym has no task "{task}"; of its {len(DATASETS)}, {like}.')
    try:
        return reasoning_gym.create_dataset(task, size=size, seed=seed, **(options or {}))
    except (TypeError, AssertionError, ValueError) as error:
        from dataclasses import fields

        known = ", ".join(f"{f.name}={f.default!r}"[:60] for f in fields(DATASETS[task][1]) if f.name != "seed")
        raise UsageError(f"gym:{task} does not take these options ({error}); it has {known}.") from None


def gym(completion: Completion, *, task: str, **options: Any) -> float:
    """Give what the task's own `score_answer` gives the final answer: 1 where it is right, 0 to below 1 otherwise.

    The row's columns are the entry: question, answer and metadata, as `edger1.tasks` and the package make them.
    """
    entry = completion.columns
    if missing := [name for name in ("answer", "metadata") if name not in entry]:
        raise UsageError(
            f"{completion.where or 'The row'} has no column {' and '.join(missing)}, which gym:{task} needs; make the "
            f"rows with reasoning-gym, or take --task gym:{task} as the questions."
        )
    lines = len(str(entry["answer"] or "").strip().splitlines()) or 1
    answer = final_answer(completion.answer, lines)
    if not answer:
        return 0.0
    return float(_scorer(task, tuple(sorted(options.items()))).score_answer(answer, entry))


@lru_cache(maxsize=32)
def _scorer(task: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return dataset(task, options=dict(options))
