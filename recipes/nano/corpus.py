"""Make the corpus: problems of every kind as chats and as plain text, a tokenizer trained on them, held-out sets.

    python -m recipes.nano.corpus FOLDER                      # 32 million tokens
    python -m recipes.nano.corpus FOLDER --tokens 2e6         # a small one, to try things

FOLDER gets train-*.jsonl, held-out.jsonl (rows as edger1.train reads them: "messages" or "text", "task", "split"), the
tokenizer's files, corpus.json with counts, and questions/held-out.jsonl, whose rows have what grading needs. The same
seed and versions give the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, TextIO

from recipes.nano import gym, talk, tokenizer
from recipes.nano.kinds import Kind, kinds
from recipes.nano.problems import Problem

SHARD_DOCUMENTS = 50_000
TOKENIZER_DOCUMENTS = 30_000
HELD_OUT_EACH = 200
FRUITLESS_TRIES = 400
"""A kind that gives nothing new so often in a row has been used up."""

Row = dict[str, Any]


@dataclass
class Mix:
    """Draws documents for training and sets problems aside; the state of one corpus being made."""

    seed: int
    held_out: dict[str, Problem] = field(default_factory=dict)
    used_up: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = Random(self.seed)
        self._kinds = kinds(self.seed)
        self._seen: dict[str, Counter[str]] = {name: Counter() for name in self._kinds}
        self._aside: Counter[str] = Counter()

    def documents(self) -> Iterator[Row]:
        """Yield documents for training until every kind is used up."""
        names = list(self._kinds)
        while names:
            weights = [self._kinds[name].weight for name in names]
            for name in self._rng.choices(names, weights, k=1000):
                if name in self.used_up:
                    continue
                problem = self._new(name)
                if problem is None:
                    self.used_up.append(name)
                else:
                    yield self._document(problem)
                if self._rng.random() < talk.SHARE:
                    yield {"messages": talk.turn(self._rng), "task": "talk", "split": "train"}
            names = [name for name in names if name not in self.used_up]

    def _new(self, name: str) -> Problem | None:
        kind: Kind = self._kinds[name]
        for _ in range(FRUITLESS_TRIES):
            problem = kind.make(self._rng)
            if problem.held_out:
                if self._aside[name] < HELD_OUT_EACH and f"{name} {problem.key}" not in self.held_out:
                    self._aside[name] += 1
                    self.held_out[f"{name} {problem.key}"] = problem
            elif self._seen[name][problem.key] < kind.repeats:
                self._seen[name][problem.key] += 1
                return problem
        return None

    def _document(self, problem: Problem) -> Row:
        about = {"task": problem.kind, "split": "train"}
        form = self._rng.random()
        if form < 0.14:
            return {"text": problem.text(self._rng), **about}
        if form < 0.17:
            # No thought: what a chat with thinking switched off asks for.
            answer = {"role": "assistant", "content": f"{tokenizer.THINK}\n\n{tokenizer.END_THINK}\n\n{problem.answer}"}
            return {"messages": [problem.messages()[0], answer], **about}
        if form < 0.21:
            # An earlier turn, whose thoughts the template has left out.
            earlier = self._new(problem.kind)
            if earlier is not None:
                said = {"role": "assistant", "content": earlier.answer}
                return {"messages": [earlier.messages()[0], said, *problem.messages()], **about}
        return {"messages": problem.messages(), **about}


def rendered(row: Row) -> str:
    """Return a row as text without special tokens: what the tokenizer is trained on."""
    return row["text"] if "text" in row else "\n".join(turn["content"] for turn in row["messages"])


def make(folder: Path, tokens: int, seed: int) -> dict[str, Any]:
    """Write a corpus of about `tokens` tokens into `folder` and return what corpus.json says of it."""
    from tokenizers import Tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    mix = Mix(seed)
    drawn = mix.documents()
    first = [row for row, _ in zip(drawn, range(TOKENIZER_DOCUMENTS), strict=False)]
    tokenizer.train(map(rendered, first), folder)
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    counts: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    waiting, shard = first, 0
    while waiting and sum(counts.values()) < tokens:
        with (folder / f"train-{shard:03}.jsonl").open("w", encoding="utf-8") as out:
            for row, length in zip(waiting, _lengths(words, waiting), strict=True):
                write(out, row)
                counts[row["task"]] += length
                documents[row["task"]] += 1
                if sum(counts.values()) >= tokens:
                    break
        shard += 1
        print(f"{sum(counts.values()) / 1e6:.1f} million tokens", file=sys.stderr, flush=True)
        waiting = [row for row, _ in zip(drawn, range(SHARD_DOCUMENTS), strict=False)]
    _write_held_out(folder, list(mix.held_out.values()))
    about = {
        "seed": seed,
        "tokens": sum(counts.values()),
        "documents": sum(documents.values()),
        "tokens_by_task": dict(sorted(counts.items())),
        "documents_by_task": dict(sorted(documents.items())),
        "held_out_by_task": dict(sorted(Counter(p.kind for p in mix.held_out.values()).items())),
        "used_up": mix.used_up,
        "reasoning_gym": gym.available(),
    }
    (folder / "corpus.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")
    return about


def _lengths(words: Any, rows: list[Row]) -> list[int]:
    # Turns have a special token before each and one at their end.
    return [
        len(encoding.ids) + 2 * len(row.get("messages", "x"))
        for row, encoding in zip(rows, words.encode_batch([rendered(row) for row in rows]), strict=True)
    ]


def _write_held_out(folder: Path, problems: list[Problem]) -> None:
    (folder / "questions").mkdir(exist_ok=True)
    with (
        (folder / "held-out.jsonl").open("w", encoding="utf-8") as out,
        (folder / "questions" / "held-out.jsonl").open("w", encoding="utf-8") as questions,
    ):
        for problem in problems:
            write(out, {"messages": problem.messages(), "task": problem.kind, "split": "held-out"})
            write(
                questions,
                {"task": problem.kind, "key": problem.key, "question": problem.question, "answer": problem.answer},
            )


def write(out: TextIO, row: Row) -> None:
    """Write one row as a line."""
    out.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> int:
    """Make the corpus and tell what is in it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=float, default=32e6, help="tokens to make, about")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if not gym.available():
        print("reasoning-gym is not installed: its tasks are left out (pip install reasoning-gym)", file=sys.stderr)
    print(json.dumps(make(options.folder, int(options.tokens), options.seed), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
