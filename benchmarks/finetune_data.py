"""Chat data for the fine-tuning benchmarks: sums worked out step by step, the same rows on every machine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import peers

ROWS = 64


def chats(folder: Path, shortest: int, longest: int) -> Path:
    """Return a folder with train.jsonl: ROWS chats of `shortest` to `longest` tokens, template included.

    Lengths are spread evenly; `folder` is the model whose tokenizer and template count. Made on the first call.
    """
    target = peers.cache() / f"chats-{shortest}-{longest}"
    if not (target / "train.jsonl").exists():
        from mlx_lm.utils import load_tokenizer

        tokenizer = load_tokenizer(folder)

        def tokens(messages: list[dict[str, str]]) -> int:
            return len(tokenizer.apply_chat_template(messages, return_dict=False))

        lengths = [longest - (longest - shortest) * i // max(1, ROWS - 1) for i in range(ROWS)]
        with peers.made_whole(target) as unfinished:
            unfinished.mkdir()
            rows = [{"messages": _chat(i, length, tokens)} for i, length in enumerate(lengths)]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (unfinished / "train.jsonl").write_text(text, encoding="utf-8")
    return target


def _chat(number: int, length: int, tokens: Callable[[Any], int]) -> list[dict[str, str]]:
    """Return the longest chat of whole steps that has at most `length` tokens."""
    generator = random.Random(number)
    terms = [generator.randrange(10, 100) for _ in range(length)]

    def made(steps: int) -> list[dict[str, str]]:
        lines, total = [], 0
        for step, term in enumerate(terms[:steps], start=1):
            lines.append(f"Step {step}: {total} + {term} = {total + term}.")
            total += term
        question = f"Add {steps} numbers, beginning with {terms[0]}, and show each step. This is sum {number}."
        answer = " ".join([*lines, f"The sum is {total}."])
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    low, high = 1, length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if tokens(made(middle)) <= length else (low, middle - 1)
    return made(low)
