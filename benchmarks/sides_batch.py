"""The sides of the batch benchmark: several sequences decoded at a time. Each runs in a worker process.

What is counted is the time in which all sequences are decoding: from when the last has its first token until the first
has its last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from itertools import count
from typing import Any

from benchmarks.sides_model import loaded


class EngineBatch:
    """Requests side by side in EdgeR1's engine, through its public API."""

    def __init__(self, folder: str, precision: str) -> None:
        import edger1

        self._model = edger1.load(folder, precision=precision, context=8192)
        self._turn = count()
        self(sequences=2, prompt=8, generate=8)

    def __call__(self, sequences: int, prompt: int, generate: int) -> Mapping[str, float]:
        """Return tokens a second of all sequences together."""
        return {"rate": asyncio.run(self._rate(sequences, prompt, generate))}

    async def _rate(self, sequences: int, prompt: int, generate: int) -> float:
        answers = await asyncio.gather(*(self._moments(prompt, generate) for _ in range(sequences)))
        began = max(moments[0] for moments, _ in answers)
        ended = min(moments[-1] for moments, _ in answers)
        if ended <= began:
            raise RuntimeError("the sequences were never decoding all at the same time")
        # An event is a token nearly always; where the splitter held one back, the tokens are shared out evenly.
        tokens = sum(sum(began < m <= ended for m in moments) * total / len(moments) for moments, total in answers)
        return tokens / (ended - began)

    async def _moments(self, prompt: int, generate: int) -> tuple[list[float], int]:
        """Answer one prompt; returns when each piece of the answer came, and how many tokens it had."""
        from edger1 import Done, Text, Thought

        # A number in front keeps every prompt out of the prefix cache of the others.
        text = f"{next(self._turn)}" + " and" * (prompt - 2)
        moments: list[float] = []
        total = 0
        async for event in self._model.astream(text, raw=True, max_tokens=generate, temperature=0, speculate="off"):
            if isinstance(event, Text | Thought):
                moments.append(time.perf_counter())
            elif isinstance(event, Done):
                total = event.usage.completion_tokens
        if len(moments) < 4:
            raise RuntimeError(f"an answer came in {len(moments)} pieces, too few to measure")
        return moments, total


class GeneratorBatch:
    """mlx-lm's BatchGenerator over the model with EdgeR1's kernels, as EdgeR1's loader leaves it."""

    def __init__(self, folder: str, precision: str) -> None:
        self._live = loaded(folder, precision)
        self(sequences=2, prompt=8, generate=8)

    def __call__(self, sequences: int, prompt: int, generate: int) -> Mapping[str, float]:
        """Return tokens a second of all sequences together."""
        import mlx.core as mx
        from mlx_lm.generate import BatchGenerator

        ids = mx.random.randint(0, 32000, (sequences, prompt)).tolist()
        generator = BatchGenerator(self._live.model, max_tokens=generate, completion_batch_size=sequences)
        try:
            generator.insert(ids)
            while len(generator.next_generated()) < sequences:
                pass
            began, tokens = time.perf_counter(), 0
            # The generator runs a step ahead; the last one is left out, for nobody waits for it.
            for _ in range(generate - 2):
                tokens += len(generator.next_generated())
            return {"rate": tokens / (time.perf_counter() - began)}
        finally:
            generator.close()


def engine(**arguments: Any) -> EngineBatch:
    """Set up EdgeR1's engine."""
    return EngineBatch(**arguments)


def generator(**arguments: Any) -> GeneratorBatch:
    """Set up mlx-lm's batch generator on EdgeR1's kernels."""
    return GeneratorBatch(**arguments)
