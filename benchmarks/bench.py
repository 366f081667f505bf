"""One run of a benchmark: its parts one after the other, each measured, printed and kept by itself."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common, kept
from benchmarks.common import Comparison, Measure, Side
from benchmarks.conditions import Conditions
from benchmarks.peers import PeerMissingError
from benchmarks.worker import Side as Worker
from benchmarks.worker import SideUnavailableError

PRECISIONS = ("fast", "exact")

Readings = dict[str, list[dict[str, float]]]


class Bench:
    """What the parts of a run share: the options, the processes that are up, the notes for the result."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.threads: int = options.threads
        self.rounds: int = options.rounds
        self.quick: bool = options.quick
        self.results: Path = options.results
        self.notes: list[str] = []
        self._up = ExitStack()
        self._conditions: Conditions | None = None

    def worker(self, function: str, arguments: Mapping[str, Any], **variables: str) -> Worker:
        """Bring up a side (`module:function` within benchmarks) in a process that ends with the part.

        Raises SideUnavailableError where it cannot run here.
        """
        environment = common.child_environment(self.threads, **variables)
        return self._up.enter_context(Worker(f"benchmarks.{function}", arguments, environment))

    def enter(self, held: AbstractContextManager[Any]) -> Any:
        """Enter a context that is left when the part ends."""
        return self._up.enter_context(held)

    def ours(self, function: str, arguments: Mapping[str, Any]) -> dict[str, Worker]:
        """Bring EdgeR1's side up in each precision that runs here; what does not is told and noted."""
        found: dict[str, Worker] = {}
        for precision in PRECISIONS:
            try:
                found[precision] = self.worker(function, {**arguments, "precision": precision})
            except SideUnavailableError as error:
                self.skip(f"EdgeR1 {precision}", str(error))
        return found

    def shipped(
        self, function: str, arguments: Mapping[str, Any], probe: Mapping[str, Any], metric: str = "rate"
    ) -> tuple[Worker, str]:
        """Bring MLX as shipped up with and without mx.compile; returns the faster at `probe`, and which it is."""
        found: list[tuple[float, str, Worker]] = []
        for settings, variables in (("compile on", {}), ("compile off", {"MLX_DISABLE_COMPILE": "1"})):
            worker = self.worker(function, {**arguments, "precision": None}, EDGER1_KERNELS="0", **variables)
            rate = worker.measure(**probe)[metric]
            print(f"  MLX as shipped, {settings}: {rate:.4g}", file=sys.stderr, flush=True)
            found.append((rate, settings, worker))
        _, settings, fastest = max(found, key=lambda side: side[0])
        for _, _, other in found:
            if other is not fastest:
                other.close()
        return fastest, f"f32, {settings}"

    def interleave(self, measures: Mapping[str, Measure], *, fewer: Mapping[str, int] | None = None) -> Readings:
        """Take the run's readings in turns; the memory's bandwidth is read between the rounds."""
        if self._conditions is None:
            return common.interleave(measures, self.rounds, fewer=fewer)
        watched: dict[str, Measure] = {"the machine": partial(_sampled, self._conditions), **measures}
        readings = common.interleave(watched, self.rounds, fewer=fewer)
        del readings["the machine"]
        return readings

    def skip(self, what: str, why: str) -> None:
        """Tell and note that something is not measured."""
        self.notes.append(common.say_skipped(what, why))

    def part(self, run: Callable[[Bench], list[Comparison]]) -> tuple[list[Comparison], dict[str, Any]]:
        """Run one part to its end; returns its comparisons and the conditions it was measured under."""
        self.notes = []
        self._conditions = Conditions(self.threads)
        try:
            with self._up:
                made = run(self)
            self._conditions.sample()
        except (PeerMissingError, SideUnavailableError) as error:
            self.skip("this part", str(error))
            made = []
        finally:
            seen = self._conditions.close()
            self._conditions = None
        return made, seen


def _sampled(conditions: Conditions) -> dict[str, float]:
    return {"GB/s": conditions.sample()}


def side(
    name: str,
    settings: str,
    readings: list[dict[str, float]],
    metric: str = "rate",
    unit: str = "tok/s",
    per: float = 1,
) -> Side:
    """Return one metric of a side's readings as a Side, divided by `per`."""
    return Side(name, settings, unit, tuple(value / per for value in common.column(readings, metric)))


def main(benchmark: str, description: str | None, parts: Mapping[str, Callable[[Bench], list[Comparison]]]) -> int:
    """Parse the command line, run the parts asked for, print and keep each; returns the exit code.

    A shortened run goes to the folder the user named with --results, or nowhere: it must not replace a full one.
    """
    made = common.parser(description)
    made.epilog = f"parts: {', '.join(parts)}"
    options = common.parse(made)
    if unknown := set(options.only) - set(parts):
        made.error(f"--only {unknown.pop()}: expected one of {', '.join(parts)}")
    bench = Bench(options)
    shortened = (options.quick or options.rounds < common.DEFAULT_ROUNDS) and options.results == common.RESULTS
    measured = 0
    for name in options.only or parts:
        print(f"{name}:", file=sys.stderr, flush=True)
        comparisons, seen = bench.part(parts[name])
        if comparisons:
            measured += 1
            common.print_table(comparisons)
        for note in bench.notes:
            print(f"note: {note}")
        if comparisons and not shortened:
            kept.save(benchmark, name, comparisons, notes=bench.notes, conditions=seen, folder=options.results)
            print(f"kept: {benchmark}.json, {name}", flush=True)
    if shortened:
        print("a shortened run: not written to benchmarks/results (give --results FOLDER to keep it)")
    return 0 if measured else 1
