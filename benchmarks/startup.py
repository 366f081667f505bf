"""From nothing to an answer: EdgeR1 beside mlx-lm on the same folder, each in a new process.

    python -m benchmarks.startup
    python -m benchmarks.startup --quick

For each side, in turns: start-up (process start until the model can be asked), time to the first token of a chat
message after that, prefill and decode rates of that answer, and the peak memory of the process as the kernel counted
it; mlx-lm through its Python API with f32 activations, its fastest here. Then both command lines, `edger1 run --json`
and `mlx_lm.generate`, from process start to process end with the same question.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import common, peers
from benchmarks.common import Comparison, Measure

PROMPT = "Name the three primary colours and say in one sentence why painters care about them."
GENERATE = 64

METRICS = (
    ("start-up", "s", True),
    ("time to first token", "s", True),
    ("prefill", "tok/s", False),
    ("decode", "tok/s", False),
    ("peak memory", "MB", True),
)
COMMAND = "whole command"


class ProcessError(Exception):
    """A measured process failed; the message is the end of what it said."""


def timed(command: Sequence[object], environment: Mapping[str, str]) -> tuple[float, float, int, str]:
    """Run a process; returns (moment it was started, seconds it took, its peak resident bytes, its standard output)."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=dict(environment),
            cwd=common.REPOSITORY,
            text=True,
        )
        assert process.stdout is not None
        with process.stdout:
            output = process.stdout.read()
        # wait4 and not wait: it tells this child's own peak memory, where getrusage would tell that of all so far.
        _, status, usage = os.wait4(process.pid, 0)
        took = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        told = errors.read().strip().splitlines()[-1:] or ["no word of why"]
    if process.returncode != 0:
        raise ProcessError(f"it ended with {process.returncode}: {told[0][:400]}")
    return began, took, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), output


def answer(side: str, folder: Path, variant: str, tokens: int, threads: int, **variables: str) -> dict[str, float]:
    """Start one side, let it answer once, and return its METRICS."""
    command = [sys.executable, "-m", "benchmarks.startup_child", side, folder, variant, tokens, PROMPT]
    began, _, peak, output = timed(command, common.child_environment(threads, **variables))
    told = json.loads(output.splitlines()[-1])
    return {
        "start-up": told["ready"] - began,
        "time to first token": told["first_token_s"],
        "prefill": told["prefill"],
        "decode": told["decode"],
        "peak memory": peak / 1e6,
    }


def command(words: Sequence[object], threads: int) -> dict[str, float]:
    """Run a command line to its end and return the seconds it took."""
    return {COMMAND: timed(words, common.child_environment(threads))[1]}


def measures(folder: Path, tokens: int, threads: int) -> dict[str, Measure]:
    """Return the sides. EdgeR1's fast and exact stand beside the same mlx-lm."""
    most = ["--max-tokens", str(tokens)]
    edger1_run = [
        Path(sys.executable).with_name("edger1"),
        "run",
        folder,
        PROMPT,
        "--json",
        "--temperature",
        "0",
        *most,
    ]
    generate = [sys.executable, "-m", "mlx_lm", "generate", "--model", folder, "--prompt", PROMPT, *most]
    return {
        "fast": partial(answer, "edger1", folder, "fast", tokens, threads),
        "exact": partial(answer, "edger1", folder, "exact", tokens, threads),
        "mlx-lm": partial(answer, "mlx-lm", folder, "float32", tokens, threads),
        "edger1 run": partial(command, edger1_run, threads),
        "mlx_lm.generate": partial(command, generate, threads),
    }


def main() -> int:
    """Measure, print, keep."""
    options = common.parse(common.parser(__doc__))
    try:
        folder = peers.smollm2_folder()
    except peers.PeerMissingError as error:
        common.say_skipped("start-up", str(error))
        return 1
    sides = measures(folder, 8 if options.quick else GENERATE, options.threads)
    if options.only:
        sides = {name: measure for name, measure in sides.items() if name in options.only}
    notes: list[str] = []
    for name in list(sides):
        # Once uncounted, so that every side finds its files in the page cache; what cannot run is left out here.
        try:
            sides[name]()
        except ProcessError as error:
            notes.append(common.say_skipped(name, str(error)))
            del sides[name]
    readings = common.interleave(sides, options.rounds)

    def side(name: str, shown: str, settings: str, metric: str, unit: str) -> common.Side:
        return common.Side(shown, settings, unit, common.column(readings[name], metric))

    comparisons = [
        Comparison(
            f"{metric}, {precision} / mlx-lm",
            side(precision, "EdgeR1", precision, metric, unit),
            side("mlx-lm", "mlx-lm", "f32, in its own process", metric, unit),
            less_is_better=less,
        )
        for precision in ("fast", "exact")
        if precision in readings and "mlx-lm" in readings
        for metric, unit, less in METRICS
    ]
    if {"edger1 run", "mlx_lm.generate"} <= set(readings):
        comparisons.append(
            Comparison(
                COMMAND,
                side("edger1 run", "edger1 run", "fast", COMMAND, "s"),
                side(
                    "mlx_lm.generate", "mlx_lm.generate", "f32 norms, f16 scales, as the folder has them", COMMAND, "s"
                ),
                less_is_better=True,
            )
        )
    return common.finish("startup", comparisons, options, notes=notes)


if __name__ == "__main__":
    raise SystemExit(main())
