"""The folder that a conversion works in, and the journal in it of what is on the disk already.

The folder lies beside the destination under a name that begins with a dot, and takes its own name when everything in it
is on the disk: nothing half-made is ever found by a name. The journal says of which source and of which plan it is, and
how many of the plan's units are done; it is renewed after what it speaks of was seen onto the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edger1.errors import EdgeR1Error, UsageError
from edger1.quant.writing import sync_path, write_text

JOURNAL = "journal.json"
VERSION = 1


@dataclass(frozen=True)
class Journal:
    """`source` is the source's fingerprint, `plan` the plan's digest; the first `units` units are on the disk.

    `zeroed` names the targets among them that zeros were put into in place of NaN and infinities.
    """

    source: str
    plan: str
    units: int = 0
    zeroed: tuple[str, ...] = ()
    version: int = VERSION


def read(folder: Path) -> Journal | None:
    """Return the journal in `folder`; None where there is none that can be gone on from."""
    try:
        values: Any = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
        found = Journal(**{**values, "zeroed": tuple(values["zeroed"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    kinds = (isinstance(found.source, str), isinstance(found.plan, str), isinstance(found.units, int))
    return found if all(kinds) and found.version == VERSION and found.units >= 0 else None


def write(folder: Path, journal: Journal) -> None:
    """Write the journal and see it onto the disk."""
    write_text(folder / JOURNAL, json.dumps(asdict(journal)) + "\n")


def begun(folder: Path, source: str, plan: str, *, renew: bool = False) -> Journal:
    """Return the journal of an earlier run of this plan in `folder`, or a fresh one.

    Where it was another source or another plan, `renew` empties the folder; otherwise UsageError is raised: what is
    there then cost work that nobody said to throw away.
    """
    found = read(folder)
    if found is None:
        return Journal(source, plan)
    if renew and (found.source, found.plan) != (source, plan):
        empty(folder)
        return Journal(source, plan)
    for what, have, want in (("its source", found.source, source), ("the recipe", found.plan, plan)):
        if have != want:
            raise UsageError(
                f"A conversion was interrupted here, and {what} is not the same any more: {folder} cannot be gone on "
                "from. Give --restart to begin anew, or put back what was changed."
            )
    return found


def working_folder(destination: Path) -> Path:
    """Return the folder in which a conversion to `destination` works."""
    return destination.with_name(f".{destination.name}.converting")


def drop(folder: Path) -> None:
    """Remove the journal of a conversion that is where it should be."""
    (folder / JOURNAL).unlink(missing_ok=True)
    sync_path(folder)


def take_back(destination: Path) -> None:
    """Make of a finished folder that nobody put in place what the same conversion goes on from.

    One that has no journal is removed.
    """
    hidden = working_folder(destination)
    if read(destination) is not None and not hidden.exists():
        destination.rename(hidden)
    else:
        shutil.rmtree(destination, ignore_errors=True)


@contextlib.contextmanager
def working(destination: Path, *, restart: bool) -> Iterator[Path]:
    """Yield the working folder of `destination`, ours alone; emptied first where `restart` says so.

    Whatever is journaled stays for the next run when this one fails; without a journal nothing does. Raises
    EdgeR1Error while another conversion has the folder.
    """
    folder = working_folder(destination)
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another conversion may have finished and renamed the folder between our two calls.
            alone = os.path.samestat(os.fstat(fd), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            alone = False
        if not alone:
            raise EdgeR1Error(f"Another conversion into {destination} is running; wait for it to finish.")
        if restart or read(folder) is None:
            empty(folder)
        try:
            yield folder
        finally:
            if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()) and read(folder) is None:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)


def empty(folder: Path) -> None:
    """Remove everything in `folder`."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
