"""The files below a directory, as a person would list them: without what .gitignore names and without hidden ones.

A directory is read before those inside it, so that a walk which is cut short has seen what lies near. Links to
directories are named and not entered: no loop can catch the walk, and it never leaves the directory it began in.
"""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE_BYTES = 1_000_000
"""What is read of a .gitignore at most."""


@dataclass(frozen=True)
class Found:
    """One entry below the directory that was walked; `name` is relative to it, with "/" between the parts."""

    name: str
    is_directory: bool


@dataclass(frozen=True)
class _Rules:
    """The patterns of one .gitignore. A name of the walk, seen from its folder, is `lead + name[skip:]`."""

    spec: GitIgnoreSpec
    lead: str = ""
    skip: int = 0

    def say(self, name: str) -> bool | None:
        """Return whether `name` is ignored; None: these patterns do not say."""
        return self.spec.check_file(self.lead + name[self.skip :]).include


def walk(
    root: Path,
    *,
    hidden: bool = False,
    entries_max: int | None = None,
    seconds_max: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Found]:
    """Yield the files and directories below `root`, near ones first and sorted within a directory.

    `hidden` lists names that begin with a dot too (never .git). Ends early at `entries_max` entries, after
    `seconds_max`, or once `stop()` is true. Directories that cannot be read are passed over. Raises nothing for what
    lies below `root`; a `root` that cannot be read has no entries.
    """
    until = None if seconds_max is None else time.monotonic() + seconds_max
    count = 0
    waiting: deque[tuple[Path, str, tuple[_Rules, ...]]] = deque([(root, "", _above(root))])
    while waiting:
        folder, prefix, rules = waiting.popleft()
        if stop() or (until is not None and time.monotonic() > until):
            return
        entries = _read(folder)
        if any(entry == ".gitignore" for entry, *_ in entries) and (spec := _spec(folder)):
            rules = (*rules, _Rules(spec, skip=len(prefix)))
        for entry, is_directory, is_link in entries:
            name = prefix + entry
            if entry == ".git" or (entry.startswith(".") and not hidden):
                continue
            if rules and _ignored(rules, name + "/" * (is_directory and not is_link)):
                continue
            if entries_max is not None and count >= entries_max:
                return
            count += 1
            yield Found(name, is_directory)
            if is_directory and not is_link:
                waiting.append((folder / entry, f"{name}/", rules))


def _read(folder: Path) -> list[tuple[str, bool, bool]]:
    """Return (name, is a directory, is a link) of each entry that is a file or a directory, sorted."""
    entries = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                try:
                    is_directory, is_link = entry.is_dir(), entry.is_symlink()
                    if is_directory or entry.is_file():
                        entries.append((entry.name, is_directory, is_link))
                except OSError:  # a link into a circle
                    continue
    except OSError:
        pass
    return sorted(entries, key=lambda entry: (entry[0].lower(), entry[0]))


def _spec(folder: Path) -> GitIgnoreSpec | None:
    """Return what the .gitignore in `folder` says, None where there is nothing in it or it cannot be read."""
    from pathspec import GitIgnoreSpec

    path = folder / ".gitignore"
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            lines = file.read(IGNORE_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    kept = [line for line in lines if line.strip() and not line.startswith("#") and _understood(line)]
    return GitIgnoreSpec.from_lines(kept) if kept else None


def _understood(line: str) -> bool:
    """Return whether a line is a pattern: one that is not takes the others not with it."""
    from pathspec import GitIgnoreSpec

    try:
        GitIgnoreSpec.from_lines([line])
    except (ValueError, re.error):
        return False
    return True


def _above(root: Path) -> tuple[_Rules, ...]:
    """Return the rules of the folders above `root`, outermost first, where `root` lies in a Git repository."""
    resolved = root.resolve()
    if (resolved / ".git").exists():
        return ()
    above: list[_Rules] = []
    for folder in resolved.parents:
        if spec := _spec(folder):
            above.append(_Rules(spec, lead=f"{resolved.relative_to(folder).as_posix()}/"))
        if (folder / ".git").exists():
            return tuple(reversed(above))
    return ()


def _ignored(rules: tuple[_Rules, ...], name: str) -> bool:
    """Return whether a name is ignored: the innermost .gitignore that says anything about it decides."""
    return next((verdict for each in reversed(rules) if (verdict := each.say(name)) is not None), False)
