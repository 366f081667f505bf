"""The memory limits that Linux's control groups put on this process, versions 1 and 2.

A process is under the limit of its own group and of every group around that one. Page cache that a group was charged
for is not counted as used here: the system takes it back before it runs out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MACHINE_STALLS = Path("/proc/pressure/memory")
# Version 1 has no word for "none", but a number near 2^63.
_NO_LIMIT = 1 << 60


@dataclass(frozen=True)
class Group:
    """A group with a limit, and what cannot be taken back of the memory that it uses."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True)
class _Files:
    limit: str
    usage: str
    reclaimable: tuple[str, ...]


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_VERSION_2 = _Files("memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))


def groups(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> tuple[Group, ...]:
    """Return the groups around this process that have a limit; none where there are none, or no Linux."""
    found = []
    for folder, files in _folders(root, membership):
        limit, usage = _number(folder / files.limit), _number(folder / files.usage)
        if limit is None or usage is None or limit >= _NO_LIMIT:
            continue
        statistics = _statistics(folder / "memory.stat")
        free = sum(statistics.get(name, 0) for name in files.reclaimable)
        found.append(Group(limit, max(0, usage - free)))
    return tuple(found)


def limit_bytes(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Return the smallest limit that this process is under, None where it is under none."""
    return min((group.limit_bytes for group in groups(root, membership)), default=None)


def stalled_share(root: Path = _ROOT, membership: Path = _MEMBERSHIP, machine: Path = _MACHINE_STALLS) -> float | None:
    """Return the share of the last 10 seconds in which something waited for memory; None where nobody measures it.

    That of the process's own group where it has one (version 2), else the machine's ("some avg10" of Linux's PSI).
    """
    own = next(
        (folder / "memory.pressure" for folder, files in _folders(root, membership) if files is _VERSION_2), None
    )
    for path in (own, machine):
        try:
            line = "" if path is None else path.read_text(encoding="ascii").partition("\n")[0]
            return float(dict(field.split("=") for field in line.split()[1:])["avg10"]) / 100
        except (OSError, ValueError, KeyError):
            continue
    return None


def _folders(root: Path, membership: Path) -> Iterator[tuple[Path, _Files]]:
    """Yield the folder of this process's group and those of the groups around it, the innermost first."""
    try:
        lines = membership.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            top, files = root, _VERSION_2
        elif "memory" in controllers.split(","):
            top, files = root / "memory", _VERSION_1
        else:
            continue
        folder = top / path.strip("/")
        # In a container the path may be the host's, of which only the group itself is to be seen, at the top.
        if ".." in folder.parts or not folder.is_dir():
            folder = top
        while True:
            if (folder / files.usage).exists():
                yield folder, files
            if folder == top:
                break
            folder = folder.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        # "max" is no limit.
        return None


def _statistics(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
        return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    except (OSError, ValueError):
        return {}
