"""From nothing to an answer: EdgeR1 beside mlx-lm on the same folder, each in a new process.

    python -m benchmarks.startup
    python -m benchmarks.startup --only command     # one part: answer, command
    python -m benchmarks.startup --quick

For each side, in turns: start-up (process start until the model can be asked), time to the first token of a chat
message after that, prefill and decode rates of that answer, and the peak memory of the process as the kernel counted
it; mlx-lm through its Python API with f32 activations, its fastest here. Then both command lines, `edger1 run --json`
and `mlx_lm.generate`, from process start to process end with the same question.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from benchmarks import bench, common, peers
from benchmarks.bench import PRECISIONS, Bench, side
from benchmarks.common import Comparison, Measure
from benchmarks.worker import SideUnavailableError

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


class ProcessError(SideUnavailableError):
    """A measured process failed; the message is the end of what it said."""


def timed(command: Sequence[object], environment: Mapping[str, str]) -> tuple[float, float, str]:
    """Run a process; returns (moment it was started, seconds it took, its standard output)."""
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
        process.wait()
        took = time.monotonic() - began
        errors.seek(0)
        told = errors.read().strip().splitlines()[-1:] or ["no word of why"]
    if process.returncode != 0:
        raise ProcessError(f"it ended with {process.returncode}: {told[0][:400]}")
    return began, took, output


def answer(side: str, folder: Path, variant: str, tokens: int, threads: int, **variables: str) -> dict[str, float]:
    """Start one side, let it answer once, and return its METRICS."""
    command = [sys.executable, "-m", "benchmarks.startup_child", side, folder, variant, tokens, PROMPT]
    began, _, output = timed(command, common.child_environment(threads, **variables))
    told = json.loads(output.splitlines()[-1])
    return {
        "start-up": told["ready"] - began,
        "time to first token": told["first_token_s"],
        "prefill": told["prefill"],
        "decode": told["decode"],
        "peak memory": told["peak_bytes"] / 1e6,
    }


def command(words: Sequence[object], threads: int) -> dict[str, float]:
    """Run a command line to its end and return the seconds it took."""
    return {COMMAND: timed(words, common.child_environment(threads))[1]}


def answers(run: Bench) -> list[Comparison]:
    """Start each side, ask it once, and hold its metrics against mlx-lm's."""
    folder, tokens = peers.smollm2_folder(), _tokens(run)
    sides: dict[str, Measure] = {
        precision: partial(answer, "edger1", folder, precision, tokens, run.threads) for precision in PRECISIONS
    }
    sides["mlx-lm"] = partial(answer, "mlx-lm", folder, "float32", tokens, run.threads)
    readings = _measured(run, sides)
    return [
        Comparison(
            f"{metric}, {precision} / mlx-lm",
            side("EdgeR1", precision, readings[precision], metric, unit),
            side("mlx-lm", "f32, in its own process", readings["mlx-lm"], metric, unit),
            less_is_better=less,
        )
        for precision in PRECISIONS
        if precision in readings and "mlx-lm" in readings
        for metric, unit, less in METRICS
    ]


def commands(run: Bench) -> list[Comparison]:
    """Run both command lines from start to end."""
    folder, most = peers.smollm2_folder(), ["--max-tokens", str(_tokens(run))]
    edger1 = Path(sys.executable).with_name("edger1")
    edger1_run = [edger1, "run", folder, PROMPT, "--json", "--temperature", "0", *most]
    generate = [sys.executable, "-m", "mlx_lm", "generate", "--model", folder, "--prompt", PROMPT, *most]
    readings = _measured(
        run, {"edger1": partial(command, edger1_run, run.threads), "mlx-lm": partial(command, generate, run.threads)}
    )
    if len(readings) < 2:
        return []
    peer = side("mlx_lm.generate", "f32 norms, f16 scales, as the folder has them", readings["mlx-lm"], COMMAND, "s")
    return [
        Comparison(COMMAND, side("edger1 run", "fast", readings["edger1"], COMMAND, "s"), peer, less_is_better=True)
    ]


def _tokens(run: Bench) -> int:
    return 8 if run.quick else GENERATE


def _measured(run: Bench, sides: dict[str, Measure]) -> bench.Readings:
    for name in list(sides):
        # Once uncounted, so that every side finds its files in the page cache; what cannot run is left out here.
        try:
            sides[name]()
        except ProcessError as error:
            run.skip(name, str(error))
            del sides[name]
    return run.interleave(sides)


if __name__ == "__main__":
    raise SystemExit(bench.main("startup", __doc__, {"answer": answers, "command": commands}))
