"""Drawing a token: EdgeR1's kernels beside mlx-lm's samplers on MLX's own operations, in one run.

    python -m benchmarks.sampling_micro                     # 49,152 tokens, SmolLM2-135M's vocabulary
    python -m benchmarks.sampling_micro --vocabulary 151936

Milliseconds from logits to a token id, the evaluation of a graph (0.05 ms and more) included; the scores are as flat as
those of a model that hesitates. A table for whoever tunes a sampler: nothing is kept. Each reading is the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from edger1.mlx_runtime import prepare

prepare()

import mlx.core as mx  # noqa: E402

from edger1 import kernels  # noqa: E402
from edger1.kernels import functions  # noqa: E402
from edger1.messages import Sampling  # noqa: E402
from edger1.sampling import Sampler  # noqa: E402

SETTINGS = {
    "greedy": Sampling(temperature=0.0),
    "temperature 0.7": Sampling(temperature=0.7),
    "top_p 0.95": Sampling(temperature=0.7, top_p=0.95),
    "top_k 40": Sampling(temperature=0.7, top_k=40),
    "min_p 0.05": Sampling(temperature=0.7, min_p=0.05),
    "repetition penalty 1.1": Sampling(temperature=0.0, repetition_penalty=1.1),
    "all of them": Sampling(temperature=0.7, top_p=0.95, top_k=40, min_p=0.05, repetition_penalty=1.1),
}
SPREAD = 3.0


def median_ms(sampler: Sampler, rows: list[mx.array]) -> float:
    tokens = list(range(100, 400))
    readings = []
    for row in rows:
        # A copy each: penalties write into what they are given.
        logits = row + 0
        mx.eval(logits)
        began = time.perf_counter()
        sampler(logits, tokens).item()
        readings.append(time.perf_counter() - began)
    return 1e3 * statistics.median(readings)


def with_kernels(work: Callable[[], float]) -> float:
    functions.acquire(kernels._load()[0])  # type: ignore[arg-type]
    try:
        return work()
    finally:
        functions.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    if not kernels.state().available:
        raise SystemExit(f"EdgeR1's kernels are {kernels.state().reason}")
    rows = [SPREAD * mx.random.normal((1, options.vocabulary)) for _ in range(options.rounds)]
    mx.eval(rows)
    for name, sampling in SETTINGS.items():
        sampler = Sampler(sampling, options.vocabulary)
        with_kernels(lambda s=sampler: median_ms(s, rows[:3]))
        ours = with_kernels(lambda s=sampler: median_ms(s, rows))
        theirs = median_ms(sampler, rows)
        print(f"{name:24} {ours:7.3f} ms   MLX's own operations {theirs:7.3f} ms   {theirs / ours:6.1f}x", flush=True)


if __name__ == "__main__":
    main()
