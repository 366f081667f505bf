"""A memory limit that the kernel enforces: run a side inside a cgroup of its own, and read back what it took.

Page cache is charged to the group that first read a file, so a limit is fair only to who reads everything inside it:
`drop_caches` before a cold run, one `Limited` for all processes of a warm one. Version 1 and 2 of cgroups are known;
making a group takes root (or a delegated group), and where none can be made `limited` raises LimitUnavailableError.

    python -m benchmarks.cgroup 4GB COMMAND ...      # run a command, print its figures
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")

_numbers = itertools.count()


class LimitUnavailableError(Exception):
    """No memory limit can be set here; the message says why."""


@dataclass(frozen=True)
class Version:
    """The files of one version of the memory controller, and where groups are made."""

    parent: Path
    limit: str
    peak: str
    usage: str
    swap: tuple[str, int | None]
    """File and value that keep a group from swapping; None stands for the limit itself (memory and swap together)."""
    kills: str
    """The file that counts the processes killed for want of memory, on a line `oom_kill N`."""
    refused: str
    """The file that counts how often the limit was hit: a number, or a line `max N`."""


V1 = Version(
    ROOT / "memory",
    "memory.limit_in_bytes",
    "memory.max_usage_in_bytes",
    "memory.usage_in_bytes",
    ("memory.memsw.limit_in_bytes", None),
    "memory.oom_control",
    "memory.failcnt",
)
V2 = Version(
    ROOT, "memory.max", "memory.peak", "memory.current", ("memory.swap.max", 0), "memory.events", "memory.events"
)


def field(text: str, name: str) -> int:
    """Return the number on the line `name N` of a cgroup's or a process's file; 0 where there is no such line."""
    for line in text.splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[0] == name:
            return int(words[1])
    return 0


@dataclass(frozen=True)
class Taken:
    """What a group took. Bytes; `peak` counts page cache too, which the kernel reclaims when the limit is near."""

    limit_bytes: int
    peak_bytes: int
    anonymous_bytes: int
    """Anonymous memory when asked, of all its processes: what cannot be reclaimed."""
    limit_hits: int
    oom_kills: int


class Limited:
    """A cgroup with a memory limit and no swap; processes enter it through `command`. Use as a context manager.

    On leaving, processes still inside are ended and the group is removed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._version, self._group = _make()
        try:
            self._write(self._version.limit, limit_bytes)
            file, value = self._version.swap
            # Without swap, or without its accounting, there is nothing to forbid.
            with contextlib.suppress(OSError):
                self._write(file, limit_bytes if value is None else value)
        except OSError as error:
            self._group.rmdir()
            raise LimitUnavailableError(f"{self._group} takes no limit of {limit_bytes} bytes: {error}") from error

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """Return a command that runs `command` inside the group from its first instruction, under the same pid."""
        enter = f'echo $$ > "{self._group}/cgroup.procs" && exec "$@"'
        return ["sh", "-c", enter, "sh", *(str(word) for word in command)]

    def taken(self) -> Taken:
        """Return what the group took so far."""
        stat = self._read("memory.stat")
        refused = self._read(self._version.refused)
        return Taken(
            limit_bytes=self.limit_bytes,
            peak_bytes=int(self._read(self._version.peak) or 0),
            anonymous_bytes=field(stat, "total_rss") or field(stat, "anon"),
            limit_hits=field(refused, "max") if "max" in refused else int(refused or 0),
            oom_kills=field(self._read(self._version.kills), "oom_kill"),
        )

    def processes(self) -> list[int]:
        """Return the pids inside."""
        return [int(word) for word in self._read("cgroup.procs").split()]

    def _read(self, name: str) -> str:
        try:
            return (self._group / name).read_text()
        except OSError:
            return ""

    def _write(self, name: str, value: int) -> None:
        (self._group / name).write_text(str(value))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            try:
                self._group.rmdir()
            except OSError:
                time.sleep(0.1)
            else:
                return
        print(f"!!! {self._group} could not be removed", file=sys.stderr)


def _make() -> tuple[Version, Path]:
    why = "there is no memory controller"
    for version in (V1, V2):
        group = version.parent / f"edger1-bench-{os.getpid()}-{next(_numbers)}"
        try:
            group.mkdir()
        except OSError as error:
            why = f"{version.parent}: {error.strerror}"
            continue
        if (group / version.limit).exists():
            return version, group
        group.rmdir()
        why = f"{version.parent} has no {version.limit}"
    raise LimitUnavailableError(f"no cgroup with a memory limit can be made ({why}); it takes Linux and root")


def drop_caches() -> None:
    """Write back what is dirty and drop the page cache of the whole machine.

    Raises LimitUnavailableError where that is not allowed: a run that is not cold must not be taken for one.
    """
    os.sync()
    try:
        DROP_CACHES.write_text("1")
    except OSError as error:
        raise LimitUnavailableError(f"the page cache cannot be dropped ({error}); it takes Linux and root") from error


@dataclass(frozen=True)
class Resident:
    """A process's resident memory in bytes, as /proc/PID/status has it: `rss` is the sum of anonymous and mapped."""

    peak: int
    """The largest rss since it began to run its program, as the kernel counted it."""
    rss: int
    anonymous: int
    mapped: int
    """Pages of files that are mapped, and shared memory."""


def resident(status: str) -> Resident:
    """Read the text of /proc/PID/status."""
    anonymous, file, shared = (1024 * field(status, name) for name in ("RssAnon", "RssFile", "RssShmem"))
    return Resident(1024 * field(status, "VmHWM"), 1024 * field(status, "VmRSS"), anonymous, file + shared)


def resident_of(pid: int | str = "self") -> Resident:
    """Read what a process has resident."""
    return resident(Path(f"/proc/{pid}/status").read_text())


def main() -> int:
    """Run a command under a limit and print what it took."""
    from edger1.units import parse_size

    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    with Limited(parse_size(sys.argv[1])) as group:
        code = subprocess.run(group.command(sys.argv[2:]), check=False).returncode
        print(json.dumps({"exit": code, **asdict(group.taken())}), file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
