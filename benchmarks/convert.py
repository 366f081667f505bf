"""What a conversion takes: memory and time on DeepSeek-R1's tensor shapes, memory beside mlx-lm's converter.

    python -m benchmarks.convert                # both parts; needs root, 50 GB of free disk, a quarter of an hour
    python -m benchmarks.convert --only peak    # one of r1, peak

`r1` converts FP8 tensors of R1's shapes (one dense and two MoE layers of 256 experts) to 4 bits, once, with a cold page
cache and under a memory limit of 2.5 GB without swap, and holds its time against the slowest of three things that it
cannot do without: reading the source, writing the output, and MLX's own quantize on one stream, each measured in the
same run. `peak` converts two bf16 models of 3 GB, a dense one and a mixture of experts, as mlx-lm's converter does.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import bench, cgroup, common, peers, random_checkpoints
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Measure, Side
from benchmarks.worker import SideUnavailableError

LIMIT_BYTES = 2_500_000_000
PEAK_BAR_GB = 2.0
TIME_BAR, MEMORY_BAR = 2.0, 3.0
PEAK_ROUNDS = 3
SAMPLE_BYTES = 4 << 30
PIECE_BYTES = 8 << 20


def r1(run: Bench) -> list[Comparison]:
    """Convert R1's shapes under the limit, then measure what bounds it."""
    source = random_checkpoints.folder("r1-fp8")
    output = _scratch() / "r1-4bit"
    try:
        with cgroup.Limited(LIMIT_BYTES) as group:
            cgroup.drop_caches()
            told = _convert("edger1", source, output, run.threads, group)
            taken = group.taken()
    except cgroup.LimitUnavailableError as error:
        raise SideUnavailableError(str(error)) from None
    read, write, quantize = _read_rate(source), _write_rate(), _quantize_rate()
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    parameters = sum(math.prod(shape) for name, _, shape in random_checkpoints.r1_tensors() if "_scale_inv" not in name)
    bounds = {
        f"reading {source_bytes / 1e9:.1f} GB at {read / 1e9:.2f} GB/s": source_bytes / read,
        f"writing {told['written_bytes'] / 1e9:.1f} GB at {write / 1e9:.2f} GB/s": told["written_bytes"] / write,
        f"MLX quantizing {parameters / 1e9:.1f}e9 numbers at {quantize / 1e6:.0f}e6/s": parameters / quantize,
    }
    for what, seconds in bounds.items():
        run.notes.append(f"{what}: {seconds:.1f} s")
    run.notes.append(f"under the limit: {taken.oom_kills} kills, limit hit {taken.limit_hits} times (page cache)")
    slowest = max(bounds, key=lambda what: bounds[what])
    ours = partial(Side, "EdgeR1", "FP8 to 4 bits, limit 2.5 GB, cold")
    return [
        Comparison(
            "peak memory converting R1's shapes / 2 GB",
            ours("GB", (told["peak_bytes"] / 1e9,)),
            Side("the bar", "", "GB", (PEAK_BAR_GB,)),
            1.0,
            form="share",
        ),
        Comparison(
            "what the limit's group held, page cache included / 2.5 GB",
            ours("GB", (taken.peak_bytes / 1e9,)),
            Side("the limit", "no swap", "GB", (LIMIT_BYTES / 1e9,)),
            1.0,
            form="share",
        ),
        Comparison(
            "time converting R1's shapes / the slowest of reading, writing and MLX's quantize",
            ours("s", (told["seconds"],)),
            Side("the bound", slowest, "s", (bounds[slowest],)),
            TIME_BAR,
            form="share",
        ),
    ]


def peak(run: Bench) -> list[Comparison]:
    """Convert 3 GB of bf16, EdgeR1 and mlx-lm in turns."""
    made = []
    for name, what in (("llama-bf16", "a dense model of 3 GB"), ("moe-bf16", "a mixture of experts of 3 GB")):
        source = random_checkpoints.folder(name)
        sides: dict[str, Measure] = {
            one: partial(_convert, one, source, _scratch() / f"{name}-{one}", run.threads)
            for one in ("edger1", "mlx-lm")
        }
        rounds = min(run.rounds, PEAK_ROUNDS)
        readings = common.interleave(sides, rounds)
        for metric, unit, per, bar in (("peak_bytes", "GB", 1e9, MEMORY_BAR), ("seconds", "s", 1, None)):
            made.append(
                Comparison(
                    f"{'peak memory' if bar else 'time'} converting {what}, mlx-lm / EdgeR1",
                    side("EdgeR1", "bf16 to 4 bits", readings["edger1"], metric, unit, per),
                    side("mlx_lm.convert", "bf16 to 4 bits", readings["mlx-lm"], metric, unit, per),
                    bar,
                    less_is_better=True,
                )
            )
    return made


def _convert(
    one: str, source: Path, output: Path, threads: int, group: cgroup.Limited | None = None
) -> dict[str, float]:
    command: list[str | Path] = [sys.executable, "-m", "benchmarks.convert_child", one, source, output, "4bit"]
    done = subprocess.run(
        group.command(command) if group else [str(word) for word in command],
        env=common.child_environment(threads),
        cwd=common.REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(output, ignore_errors=True)
        tail = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        raise SideUnavailableError(f"{one} ended with {done.returncode}: {tail[:400]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _read_rate(source: Path) -> float:
    """Return bytes a second of reading the source from front to back, cold."""
    cgroup.drop_caches()
    piece, done, began = bytearray(PIECE_BYTES), 0, time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while done < SAMPLE_BYTES and (got := file.readinto(piece)):
                done += got
    return done / (time.perf_counter() - began)


def _write_rate() -> float:
    """Return bytes a second of writing a file and seeing it onto the disk."""
    path = _scratch() / "written"
    piece = np.random.default_rng(0).bytes(PIECE_BYTES)
    try:
        began = time.perf_counter()
        with path.open("wb", buffering=0) as file:
            for _ in range(SAMPLE_BYTES // PIECE_BYTES // 2):
                file.write(piece)
            os.fsync(file.fileno())
        return SAMPLE_BYTES / 2 / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def _quantize_rate() -> float:
    """Return numbers a second of mx.quantize at 4 bits on one expert, in bf16 or f32, whichever is faster."""
    import mlx.core as mx

    rates = []
    expert = np.random.default_rng(0).standard_normal((2048, 7168), np.float32)
    for dtype in (mx.bfloat16, mx.float32):
        array = mx.array(expert).astype(dtype)
        mx.eval(array)
        for _ in range(5):
            began = time.perf_counter()
            mx.eval(*mx.quantize(array, group_size=64, bits=4))
            rates.append(expert.size / (time.perf_counter() - began))
    return max(rates)


def _scratch() -> Path:
    folder = peers.cache() / "converted"
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == "__main__":
    raise SystemExit(bench.main("convert", __doc__, {"r1": r1, "peak": peak}))
