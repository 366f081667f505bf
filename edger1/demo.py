"""A model's sample questions: demo.jsonl in its folder, one question of a kind that it learned a line, with the answer.

    {"task": "sort numbers", "question": "Sort from small to large: 23, 6, 12.", "answer": "6, 12, 23"}

None of them was trained on. Other programs that read model folders leave the file alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from random import Random

from edger1.errors import FormatError, UsageError

FILE = "demo.jsonl"


@dataclass(frozen=True)
class Question:
    """One question with the answer that is expected, and which kind it is of."""

    task: str
    question: str
    answer: str


def questions(folder: Path, count: int, seed: int | None = None) -> list[Question]:
    """Return `count` questions of the model in `folder`, of as many kinds as there are before any kind comes again.

    Without a seed they are others each time. Raises UsageError for a model that has none, and FormatError for a file
    that is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise UsageError(f"{folder.name} has no sample questions ({FILE}); edger1 demo without a name asks nano-moe.")
    try:
        every = [Question(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is damaged ({error}); expected task, question and answer in each line.") from None
    rng = Random(seed)
    kinds: dict[str, list[Question]] = {}
    for one in rng.sample(every, len(every)):
        kinds.setdefault(one.task, []).append(one)
    rounds = zip_longest(*rng.sample(list(kinds.values()), len(kinds)))
    return [one for round in rounds for one in round if one is not None][:count]
