"""What every benchmark shares: interleaved readings, medians, ratios, the machine, and the file a result is kept in.

Both sides of a comparison are measured in one run and in turns (A B A B ...), so that a machine that warms up or is
disturbed favours neither. The figure of a side is the median of its readings; all readings are kept. A ratio above 1
means that EdgeR1 is better: faster, or smaller.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
DEFAULT_ROUNDS = 5

Measure = Callable[[], Mapping[str, float]]
"""Takes one reading of one side: metric name -> value."""


@dataclass(frozen=True)
class Side:
    """What one side of a comparison showed: `readings` in `unit`, in the order taken."""

    name: str
    settings: str
    unit: str
    readings: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that counts."""
        return statistics.median(self.readings)

    @property
    def spread(self) -> float:
        """How far the readings lie apart: the largest less the smallest, relative to the median."""
        return (max(self.readings) - min(self.readings)) / self.median if self.median else 0.0


Form = Literal["times", "share", "difference", "gain"]


@dataclass(frozen=True)
class Comparison:
    """One line of a benchmark: EdgeR1 against a peer. `bar` is what the figure is to reach, None where there is none.

    `form` says what the figure is: how many "times" better EdgeR1 is (`less_is_better` is for seconds and bytes), which
    "share" of the peer's value ours is at most, by what "difference" in their unit ours exceeds it at most, or by what
    "gain" at least.
    """

    what: str
    ours: Side
    peer: Side
    bar: float | None = None
    less_is_better: bool = False
    form: Form = "times"

    @property
    def figure(self) -> float:
        """What is held against the bar, from the medians."""
        ours, peer = self.ours.median, self.peer.median
        if self.form in ("difference", "gain"):
            return ours - peer
        return peer / ours if self.form == "times" and self.less_is_better else ours / peer

    @property
    def met(self) -> bool | None:
        """Whether the figure reaches the bar; None without a bar."""
        if self.bar is None:
            return None
        return self.figure >= self.bar if self.form in ("times", "gain") else self.figure <= self.bar


def cores() -> int:
    """Return the number of physical cores this process may run on: what both sides of a comparison get."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, psutil.cpu_count(logical=False) or allowed)


def child_environment(threads: int, **extra: str) -> dict[str, str]:
    """Return the environment of a measured process: `threads` for everyone, and nobody's tuning left over.

    Variables that force a library into a slower (or faster) path than it chooses by itself are taken out; `extra` is
    added last.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("OPENBLAS_", "OMP_", "GOMP_", "EDGER1_", "MLX_", "GGML_")) or key == "EDGER1_HOME"
    }
    for key in ("EDGER1_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        environment[key] = str(threads)
    # Results must not depend on whether a model hub happens to answer.
    environment["HF_HUB_OFFLINE"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    return environment | extra


def interleave(
    sides: Mapping[str, Measure], rounds: int, *, fewer: Mapping[str, int] | None = None, log: bool = True
) -> dict[str, list[dict[str, float]]]:
    """Take `rounds` readings of each side in turns and return them by side.

    `fewer` names sides that take so long that they get fewer readings, in the first rounds.
    """
    readings: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(1, rounds + 1):
        for name, measure in sides.items():
            if number > (fewer or {}).get(name, rounds):
                continue
            began = time.perf_counter()
            reading = dict(measure())
            readings[name].append(reading)
            if log:
                shown = ", ".join(f"{metric} {value:.4g}" for metric, value in reading.items())
                took = time.perf_counter() - began
                print(f"  round {number}/{rounds}  {name}: {shown}  ({took:.1f} s)", file=sys.stderr, flush=True)
    return readings


def column(readings: list[dict[str, float]], metric: str) -> tuple[float, ...]:
    """Return one metric out of a side's readings."""
    return tuple(reading[metric] for reading in readings)


def say_skipped(what: str, why: str) -> str:
    """Tell loudly that something is not measured; return the sentence, for the result's notes."""
    sentence = f"SKIPPED: {what}: {why}"
    print(f"\n!!! {sentence}\n", file=sys.stderr, flush=True)
    return sentence


def machine() -> dict[str, Any]:
    """Describe the machine and the software: what a reader needs to judge the figures."""
    import psutil

    versions = {"python": platform.python_version()}
    for package in ("edger1", "mlx", "mlx-lm", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return {
        "cpu": _cpu_model(),
        "instruction_sets": instruction_sets(),
        "physical_cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "versions": versions,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        fields = {name.strip(): value.strip() for name, _, value in lines}
        if "model name" in fields:
            return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"
    if sys.platform == "darwin":
        return subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False
        ).stdout.strip()
    return platform.processor() or "unknown"


def instruction_sets() -> list[str]:
    """Return the vector extensions that matter to matrix kernels, of those the system reports."""
    wanted = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
    wanted_on_arm = ("asimd", "asimddp", "i8mm", "sve")
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return []
    reported = {
        word
        for line in cpuinfo.read_text().splitlines()
        if line.lower().startswith(("flags", "features"))
        for word in line.split(":", 1)[1].split()
    }
    return [name for name in wanted + wanted_on_arm if name in reported]


def print_table(comparisons: list[Comparison]) -> None:
    """Print the comparisons as a Markdown table."""
    rows = [("what", "EdgeR1", "peer", "", "figure", "bar", "", "spread")]
    for line in comparisons:
        unit = f" {line.ours.unit}" if line.form in ("difference", "gain") else ""
        sign = ">=" if line.form in ("times", "gain") else "<="
        rows.append(
            (
                line.what,
                f"{_figure(line.ours.median)} {line.ours.unit}",
                f"{_figure(line.peer.median)} {line.peer.unit}",
                f"{line.peer.name} ({line.peer.settings})" if line.peer.settings else line.peer.name,
                f"{line.figure:.2f}{unit}",
                "" if line.bar is None else f"{sign} {line.bar:g}{unit}",
                {None: "", True: "met", False: "NOT met"}[line.met],
                f"{line.ours.spread:.0%}, {line.peer.spread:.0%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for index, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if index == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(
        description=(description or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=DEFAULT_ROUNDS, help="readings of each side; the median counts")
    made.add_argument("--threads", type=int, default=cores(), help="threads of both sides")
    made.add_argument("--quick", action="store_true", help="one round of shorter work, to see that all of it runs")
    made.add_argument("--only", action="append", default=[], metavar="PART", help="measure only this part; repeatable")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder the result is written to")
    return made


def parse(made: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; --quick means one round unless --rounds says otherwise."""
    options = made.parse_args()
    if options.quick and options.rounds == DEFAULT_ROUNDS:
        options.rounds = 1
    return options
