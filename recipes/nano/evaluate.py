"""Ask a model the held-out questions, greedily, and tell how many of each kind it answers right.

    python -m recipes.nano.evaluate MODEL FOLDER                # FOLDER as the corpus was made in
    python -m recipes.nano.evaluate MODEL FOLDER --each 50 --json

MODEL is a name or a folder that `edger1.load` takes. An answer that does not end within the limit counts as wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from recipes.nano.kinds import grade

MAX_TOKENS = 256
AT_ONCE = 8


@dataclass(frozen=True)
class Question:
    """One held-out question, as questions/held-out.jsonl has it."""

    task: str
    key: str
    question: str
    answer: str


Ask = Callable[[Sequence[str]], Sequence[str]]
"""Takes questions and returns a model's answers to them, without thoughts."""


def read(folder: Path, each: int) -> list[Question]:
    """Return up to `each` held-out questions of every kind, sorted by kind."""
    lines = (folder / "questions" / "held-out.jsonl").read_text("utf-8").splitlines()
    questions = sorted((Question(**json.loads(line)) for line in lines), key=lambda q: q.task)
    return [q for _, of_task in groupby(questions, key=lambda q: q.task) for q in list(of_task)[:each]]


def accuracy(questions: Sequence[Question], ask: Ask) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, right, asked) for each kind."""
    for task, group in groupby(questions, key=lambda q: q.task):
        asked = list(group)
        right = 0
        for start in range(0, len(asked), AT_ONCE):
            some = asked[start : start + AT_ONCE]
            answers = ask([q.question for q in some])
            right += sum(grade(task, q.key, q.answer, answer) for q, answer in zip(some, answers, strict=True))
        yield task, right, len(asked)


def asker(name: str) -> Ask:
    """Return what asks the model of a name or folder, greedily; an answer that did not end is empty."""
    import edger1

    model = edger1.load(name, context=1024)

    def ask(questions: Sequence[str]) -> list[str]:
        handles = [
            model.submit([{"role": "user", "content": question}], temperature=0, max_tokens=MAX_TOKENS)
            for question in questions
        ]
        done = [handle.result() for handle in handles]
        return [response.text if response.finish_reason == "stop" else "" for response in done]

    return ask


def main() -> int:
    """Measure and print, a line a kind and the mean over kinds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=200, help="questions of each kind, at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    shares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for task, right, asked in accuracy(read(options.folder, options.each), asker(options.model)):
        shares[task], counts[task] = right / asked, asked
        print(f"{task:15} {right:4} of {asked:4}  {right / asked:7.1%}", file=sys.stderr, flush=True)
    mean = sum(shares.values()) / max(1, len(shares))
    if options.json:
        print(json.dumps({"mean": mean, "kinds": shares, "asked": counts}, indent=1))
    else:
        print(f"mean over {len(shares)} kinds: {mean:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
