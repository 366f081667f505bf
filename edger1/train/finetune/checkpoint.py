"""Checkpoints of fine-tuning: the adapter with the state of training beside it.

    RUN/checkpoints/step-00000500/
        adapter/                  in mlx-lm's layout, ready to use
        training.safetensors      the adapter's weights and the optimizer's state in f32, and the method's arrays
        training.json             how far the run is, what was best, the method's values

A checkpoint is written aside and renamed, and the last two are kept, so there is a good one at every moment. From it a
run goes on to the very weights that it would have had without a stop. RUN/checkpoints/best is the adapter alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from edger1.errors import FormatError
from edger1.train.adamw import Table
from edger1.train.folder_writer import write_folder, write_tensors

KEPT = 2
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    """Tokens that counted."""
    seconds: float = 0.0
    """Time spent in steps."""
    best: float | None = None
    """The best measurement, higher being better, and the step that it was made after."""
    best_step: int = 0
    stale: int = 0
    """Measurements since then."""
    ended: bool = False
    """Whether the run ended early, for want of better measurements."""


@dataclass(frozen=True)
class State:
    """Everything a run goes on from."""

    progress: Progress
    arrays: Table
    """Weights as "weights.NAME", moments as "m.NAME" and "v.NAME", the method's arrays as "method.NAME"."""
    values: dict[str, Any]
    """The method's plain values."""


def save(run: Path, state: State, save_adapter: Any) -> Path:
    """Save a checkpoint and drop those before the last two; return its folder.

    `save_adapter` writes the adapter into a folder. Raises SaveError, after which earlier checkpoints are whole.
    """
    folder = run / "checkpoints" / f"step-{state.progress.step:08d}"

    def fill(aside: Path) -> None:
        save_adapter(aside / "adapter")
        write_tensors(aside / "training.safetensors", state.arrays)
        about = {"format": _FORMAT, "progress": asdict(state.progress), "values": state.values}
        (aside / "training.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    write_folder(folder, fill)
    for old in _all(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    found = _all(run)
    return found[-1] if found else None


def best(run: Path) -> Path:
    """Return where a run's best adapter lies, if one was measured."""
    return run / "checkpoints" / "best"


def load(folder: Path) -> State:
    """Return what a checkpoint holds. Raises FormatError where it is damaged or of another version."""
    try:
        about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if about["format"] != _FORMAT:
            raise FormatError(f"{folder} was saved by another version of EdgeR1; start the run afresh.")
        arrays = cast(Table, mx.load(str(folder / "training.safetensors")))
        mx.eval(list(arrays.values()))
        return State(Progress(**about["progress"]), arrays, about["values"])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{folder} is no whole checkpoint ({error}); remove it to go on from the one before."
        ) from None


def _all(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))
