"""A run's folder, whatever is trained in it: where it may begin, its settings, its checkpoints, how it ends in a loss.

    RUN/checkpoints/step-00000500/
        ...                       what the kind of training adds, ready to use
        training.safetensors      arrays that a run goes on from
        training.json             plain values that it goes on from

A checkpoint is written aside and renamed, and the last two are kept, so there is a good one at every moment.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar, cast

import mlx.core as mx

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.fetch.place import write_atomically
from edger1.train.adamw import Table
from edger1.train.folder_writer import SaveError, write_folder, write_tensors

KEPT = 2
_FORMAT = 1

T = TypeVar("T")


class DivergedError(EdgeR1Error):
    """The loss or the gradient is no number any more."""


def diverged(run: Path, step: int, what: str) -> DivergedError:
    """Return the error for a step whose update was not made; `what` says what the loss and the gradient are."""
    kept = latest(run)
    good = f"the last good checkpoint is {kept}" if kept else "no checkpoint had been saved yet"
    return DivergedError(
        f"{what} at step {step}, whose update was not made; {good}. Lower the learning rate, or look at the data, and "
        f"{'go on with --resume' if kept else 'begin again'}."
    )


def check(run: Path, beginnings: Collection[str], *, resume: bool) -> None:
    """Raise UsageError where a run cannot begin in a folder or, with `resume`, go on from it.

    `beginnings` are the names that a run leaves which ended before its first checkpoint.
    """
    found = latest(run)
    if resume and found is None:
        raise UsageError(f"{run} holds no checkpoint to go on from; leave --resume out to begin.")
    if not resume and run.exists():
        names = {path.name for path in run.iterdir()} if run.is_dir() else {"a file"}
        if names and (found is not None or not ("log.jsonl" in names and names <= set(beginnings))):
            raise UsageError(f"{run} exists and is not empty; give another --output, or --resume to go on with it.")


def write_settings(path: Path, text: str) -> None:
    """Write a run's settings where they are not there already. Raises SaveError where that cannot be done."""
    try:
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_atomically(path, text)
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror or error}. Nothing was changed.") from None


def save(run: Path, step: int, fill: Callable[[Path], None], arrays: Table, about: dict[str, Any]) -> Path:
    """Save a checkpoint and drop those before the last two; return its folder.

    `fill` adds what is ready to use. Raises SaveError, after which earlier checkpoints are whole.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"

    def write(aside: Path) -> None:
        fill(aside)
        write_tensors(aside / "training.safetensors", arrays)
        (aside / "training.json").write_text(json.dumps({"format": _FORMAT, **about}, indent=1), encoding="utf-8")

    write_folder(folder, write)
    for old in _all(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    found = _all(run)
    return found[-1] if found else None


def load(folder: Path, taken: Callable[[dict[str, Any], Table], T]) -> T:
    """Return what `taken` makes of a checkpoint's plain values and arrays.

    Raises FormatError where it is damaged or of another version.
    """
    try:
        about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if about.pop("format") != _FORMAT:
            raise FormatError(f"{folder} was saved by another version of EdgeR1; start the run afresh.")
        arrays = cast(Table, mx.load(str(folder / "training.safetensors")))
        mx.eval(list(arrays.values()))
        return taken(about, arrays)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise FormatError(
            f"{folder} is no whole checkpoint ({error}); remove it to go on from the one before."
        ) from None


def _all(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))
