"""Quantized products by shape: EdgeR1's kernels beside NumPy's dense product of the same shape, in one run.

    python -m benchmarks.kernels_micro                  # every shape, 512 rows
    python -m benchmarks.kernels_micro --rows 128       # other rows; EDGER1_ISA and EDGER1_THREADS choose the rest

A table for whoever tunes a kernel: nothing is kept. Readings of the sides take turns; each is the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from edger1 import kernels
from edger1.kernels.quantized import Precision, quantized_matmul

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048))  # (K, N): SmolLM2-135M's, and a larger one
FORMATS = ((4, 32), (4, 64), (8, 32))
PRECISIONS: tuple[Precision, ...] = ("fast", "exact")


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def sides(rows: int, inputs: int, outputs: int, bits: int, group: int) -> dict[str, Callable[[], object]]:
    dense = mx.random.normal((outputs, inputs))
    w = mx.quantize(dense, group, bits)
    x, g = mx.random.normal((rows, inputs)), mx.random.normal((rows, outputs))
    mx.eval(w, x, g)
    a, b = np.array(x), np.array(dense).T

    def forward(precision: Precision) -> Callable[[], object]:
        return lambda: mx.eval(quantized_matmul(x, *w, group_size=group, bits=bits, precision=precision))

    found: dict[str, Callable[[], object]] = {precision: forward(precision) for precision in PRECISIONS}
    found["x @ w"] = lambda: mx.eval(quantized_matmul(g, *w, transpose=False, group_size=group, bits=bits))
    found["NumPy f32"] = lambda: a @ b
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    extension = kernels._load()[0]
    if extension is None:
        raise SystemExit(f"EdgeR1's kernels are {kernels.state().reason}")
    print(f"{extension.active_instruction_set()}, {extension.threads()} threads, {options.rows} rows, GFLOP/s")
    for bits, group in FORMATS:
        for inputs, outputs in SHAPES:
            work = sides(options.rows, inputs, outputs, bits, group)
            readings: dict[str, list[float]] = {name: [] for name in work}
            for name in work:
                work[name]()
            for _ in range(options.rounds):
                for name, side in work.items():
                    readings[name].append(seconds(side))
            rates = {
                name: 2e-9 * options.rows * inputs * outputs / statistics.median(r) for name, r in readings.items()
            }
            columns = "  ".join(f"{name} {rate:6.0f}" for name, rate in rates.items())
            print(f"{bits} bits, groups of {group:3}  {inputs:4} -> {outputs:4}  {columns}", flush=True)


if __name__ == "__main__":
    main()
