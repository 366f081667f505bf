"""Checkpoints of fine-tuning: the adapter with the state of training beside it (`run_folder` says how they lie).

adapter/ is in mlx-lm's layout, ready to use; training.safetensors holds the adapter's weights, the optimizer's state
in f32 and the method's arrays, training.json how far the run is, what was best and the method's values. From a
checkpoint a run goes on to the very weights that it would have had without a stop. RUN/checkpoints/best is the adapter
alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edger1.train import run_folder
from edger1.train.adamw import Table


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
    about = {"progress": asdict(state.progress), "values": state.values}
    return run_folder.save(run, state.progress.step, lambda aside: save_adapter(aside / "adapter"), state.arrays, about)


def best(run: Path) -> Path:
    """Return where a run's best adapter lies, if one was measured."""
    return run / "checkpoints" / "best"


def load(folder: Path) -> State:
    """Return what a checkpoint holds. Raises FormatError where it is damaged or of another version."""
    return run_folder.load(
        folder, lambda about, arrays: State(Progress(**about["progress"]), arrays, dict(about["values"]))
    )
