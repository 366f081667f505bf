"""Carries out a plan: a few threads read, quantize and write units; the calling thread sees them onto the disk.

Threads take the units in order, each reading its next one while others compute and write, so that the source, the
processor and the destination are busy at the same time. Memory holds as many units as there are threads. What is done
is journaled whenever about `SYNC_BYTES` more of it are on the disk, and at most that much is done again after a stop.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import mlx.core as mx
import numpy as np

from edger1.errors import FormatError
from edger1.quant import journal, quantizing, threads
from edger1.quant.formats.ggml import Array
from edger1.quant.journal import Journal
from edger1.quant.planning import Job, Plan, Unit
from edger1.quant.source import Codes
from edger1.quant.writing import PART, Shard, Writer

SYNC_BYTES = 512 << 20
POLL_S = 0.2

OnProgress = Callable[[int, int], None]
Importance = Callable[[str, int, int], "np.ndarray | None"]
"""What an error costs by column, for rows [start, stop) of the module of this path; see quantizing.quantize."""


class Supply(Protocol):
    """Where the source's bytes come from when they are not all there at the start."""

    def begin(self, names: Sequence[str]) -> None:
        """Hear which tensors will be needed, in the order of their first use."""
        ...

    def need(self, names: tuple[str, ...]) -> None:
        """Return when these tensors can be read; raises what hinders that. Called from any thread."""
        ...

    def passed(self, names: frozenset[str]) -> None:
        """Hear that these tensors are not needed any more, in this run or a later one."""
        ...

    def waiting(self) -> int:
        """Return how many threads wait in `need`."""
        ...

    def press(self) -> None:
        """Hear that all threads wait although everything that could be passed was."""
        ...

    def stop(self) -> None:
        """Hear that nobody waits any longer, so that `need` returns or raises at once."""
        ...


class Local:
    """The supply of what lies on the disk: there is nothing to do."""

    def begin(self, names: Sequence[str]) -> None: ...  # noqa: D102
    def need(self, names: tuple[str, ...]) -> None: ...  # noqa: D102
    def passed(self, names: frozenset[str]) -> None: ...  # noqa: D102
    def press(self) -> None: ...  # noqa: D102
    def waiting(self) -> int:  # noqa: D102
        return 0

    def stop(self) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Options:
    """How to carry a plan out. `zero_nonfinite` makes zeros of NaN and infinities, which otherwise are an error."""

    threads: int
    zero_nonfinite: bool = False
    importance: Importance | None = None


def run(plan: Plan, folder: Path, begun: Journal, options: Options, supply: Supply, on_progress: OnProgress) -> Journal:
    """Carry out in `folder` what `begun` leaves to do of `plan`; returns the journal of all of it.

    `on_progress(done, total)` hears of bytes written, on the calling thread. Raises FormatError for a source that does
    not hold what it said, naming the target, and OSError where the disk is full.
    """
    if not _is_there(plan, folder, begun.units):
        begun = replace(begun, units=0, zeroed=())
    sizes = [sum(plan.jobs[unit.job].unit_bytes(unit.start, unit.stop)) for unit in plan.units]
    total, written, unsettled = sum(sizes), sum(sizes[: begun.units]), 0
    with Writer(folder, (*plan.shards, *plan.ahead)) as writer:
        ledger = _Ledger(plan, folder, begun, writer, supply)
        ledger.settle(begun.units, ())
        supply.begin(ledger.upcoming())
        workers = _Workers(plan, begun.units, options, supply, writer)
        at = begun.units
        try:
            with workers:
                while at < len(plan.units):
                    on_progress(written, total)
                    upto = workers.wait(at)
                    fresh = sum(sizes[at:upto])
                    written, unsettled, at = written + fresh, unsettled + fresh, upto
                    starved = 0 < workers.active() <= supply.waiting()
                    if unsettled >= SYNC_BYTES or (starved and unsettled):
                        ledger.settle(at, workers.zeroed)
                        unsettled = 0
                    elif starved:
                        supply.press()
        finally:
            # Also where it was stopped: what is done need not be done again.
            ledger.settle(workers.prefix, workers.zeroed)
        on_progress(written, total)
    return ledger.journal


class _Ledger:
    """What is on the disk: the journal, the shards that are whole, the tensors that have been passed."""

    def __init__(self, plan: Plan, folder: Path, begun: Journal, writer: Writer, supply: Supply) -> None:
        self.journal = replace(begun, units=0)
        self._plan, self._folder, self._writer, self._supply = plan, folder, writer, supply
        self._shard_of = {output.name: shard for shard in (*plan.shards, *plan.ahead) for output in shard.outputs}
        self._left = Counter(self._shard(unit).file for unit in plan.units)
        self._unfinished = {shard.file: shard for shard in (*plan.shards, *plan.ahead)}
        self._last_use: dict[str, int] = {}
        for number, unit in enumerate(plan.units):
            for name in unit.sources:
                self._last_use[name] = number

    def settle(self, upto: int, zeroed: tuple[str, ...]) -> None:
        """See the first `upto` units onto the disk, then say so, then act on it; each step may be the last."""
        self._writer.sync()
        before = self.journal.units
        found = tuple(sorted({*self.journal.zeroed, *zeroed}))
        self.journal = replace(self.journal, units=upto, zeroed=found)
        journal.write(self._folder, self.journal)
        self._left.subtract(self._shard(unit).file for unit in self._plan.units[before:upto])
        for file in [file for file in self._unfinished if not self._left[file]]:
            self._writer.finish(self._unfinished.pop(file))
        passed = frozenset(name for name, number in self._last_use.items() if before <= number < upto)
        self._supply.passed(passed)

    def upcoming(self) -> list[str]:
        """Return the tensors that the units left to do are made of, in the order of their first use."""
        found: dict[str, None] = {}
        for unit in self._plan.units[self.journal.units :]:
            found |= dict.fromkeys(unit.sources)
        return list(found)

    def _shard(self, unit: Unit) -> Shard:
        return self._shard_of[next(iter(self._plan.jobs[unit.job].outputs.values())).name]


class _Workers:
    """Threads that take units in order until there are no more, one has failed, or nobody wants them."""

    def __init__(self, plan: Plan, begin: int, options: Options, supply: Supply, writer: Writer) -> None:
        self._plan, self._options, self._supply, self._writer = plan, options, supply, writer
        self._next = self._prefix = begin
        self._done: set[int] = set()
        self._zeroed: set[str] = set()
        self._errors: dict[int, BaseException] = {}
        self._stopped = False
        self._changed = threading.Condition()
        self._ended: list[threading.Event] = []

    def __enter__(self) -> Self:
        self._ended = [threads.start(self._work) for _ in range(self._options.threads)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
        self._supply.stop()
        for ended in self._ended:
            ended.wait()

    def active(self) -> int:
        """Return how many threads are at work or waiting."""
        return sum(not ended.is_set() for ended in self._ended)

    @property
    def prefix(self) -> int:
        """Up to where all units are written."""
        with self._changed:
            return self._prefix

    @property
    def zeroed(self) -> tuple[str, ...]:
        """The targets that zeros were put into so far."""
        with self._changed:
            return tuple(self._zeroed)

    def wait(self, at: int) -> int:
        """Return up to where all units are written, once that is beyond `at` or some time has gone by.

        Raises what stopped a thread.
        """
        with self._changed:
            if self._prefix <= at and not self._errors:
                self._changed.wait(POLL_S)
            if self._errors:
                raise self._errors[min(self._errors)]
            return self._prefix

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._stopped or self._errors or self._next >= len(self._plan.units):
                    return
                number = self._next
                self._next += 1
            try:
                with mx.stream(quantizing.thread_stream()):
                    self._do(self._plan.units[number])
            except BaseException as error:  # raised again in the calling thread
                with self._changed:
                    self._errors[number] = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._done.add(number)
                while self._prefix in self._done:
                    self._done.remove(self._prefix)
                    self._prefix += 1
                self._changed.notify_all()

    def _do(self, unit: Unit) -> None:
        job = self._plan.jobs[unit.job]
        self._supply.need(unit.sources)
        try:
            parts = self._parts(job, unit)
        except FormatError as error:
            named = job.target.name in str(error)
            raise FormatError(str(error) if named else f"{job.target.name}: {error}") from error
        for suffix, array in parts.items():
            self._writer.write(job.outputs[suffix].name, unit.start, array)

    def _parts(self, job: Job, unit: Unit) -> dict[str, Array]:
        target = job.target
        if job.carried:
            return quantizing.by_suffix(self._finite_codes(job, unit))
        rows = target.read(unit.start, unit.stop)
        if rows.dtype == np.float32 and not quantizing.finite(rows):
            rows = self._without_nonfinite(job, unit, rows)
        if job.spec is None:
            return {"": quantizing.plain(rows, target.dtype)}
        importance = self._options.importance
        weights = importance(job.path, unit.start, unit.stop) if importance else None
        dtype = job.outputs["scales"].dtype
        return quantizing.by_suffix(quantizing.quantize(rows, job.spec, dtype, weights))

    def _finite_codes(self, job: Job, unit: Unit) -> Codes:
        assert job.spec is not None
        codes = job.target.codes(unit.start, unit.stop)
        broken = quantizing.broken_groups(codes, job.spec.mode)
        if not broken.any():
            return codes
        self._admit(job, unit, f"{int(np.count_nonzero(broken)):,} groups of codes")
        return quantizing.without_groups(codes, broken)

    def _without_nonfinite(self, job: Job, unit: Unit, rows: np.ndarray) -> np.ndarray:
        self._admit(job, unit, f"{int(np.count_nonzero(~np.isfinite(rows))):,} values")
        return np.nan_to_num(rows, nan=0.0, posinf=0.0, neginf=0.0)

    def _admit(self, job: Job, unit: Unit, what: str) -> None:
        """Note that zeros are put into a target, or refuse it."""
        if not self._options.zero_nonfinite:
            raise FormatError(
                f"{job.target.name} holds {what} that are NaN or infinite in rows {unit.start} to "
                f"{unit.stop - 1}; the source is damaged, or was published so. Fetch it again, or make zeros of them "
                "with --zero-nonfinite."
            )
        with self._changed:
            self._zeroed.add(job.target.name)


def _is_there(plan: Plan, folder: Path, units: int) -> bool:
    """Tell whether the shards hold the first `units` units as far as their lengths say."""
    if units > len(plan.units):
        return False
    begun = {next(iter(plan.jobs[unit.job].outputs.values())).name for unit in plan.units[:units]}
    for shard in (*plan.shards, *plan.ahead):
        if any(output.name in begun for output in shard.outputs):
            paths = (folder / shard.file, folder / (shard.file + PART))
            if not any(path.is_file() and path.stat().st_size == shard.nbytes for path in paths):
                return False
    return True
