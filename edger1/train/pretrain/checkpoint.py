"""Checkpoints of pretraining: a model folder with the state of training beside it (`run_folder` says how they lie).

The model is in bf16, ready to use; training.safetensors holds weights and optimizer state in f32, training.json the
step, the place in the data and what was seen. From a checkpoint a run goes on to the very losses that it would have had
without a stop.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edger1.train import run_folder
from edger1.train.adamw import Table
from edger1.train.pretrain import export
from edger1.train.pretrain.packing import Place


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    """Tokens of documents that were predicted from, padding not counted."""
    place: Place = field(default_factory=Place)
    seconds: float = 0.0
    """Time spent in steps."""


def save(run: Path, progress: Progress, model: Any, config: dict[str, Any], tokenizer: Path, state: Table) -> Path:
    """Save a checkpoint and drop those before the last two; return its folder.

    `state` is everything in f32, under names of its own. Raises SaveError, after which earlier checkpoints are whole.
    """

    def fill(aside: Path) -> None:
        export.fill(aside, model, config, tokenizer)

    return run_folder.save(run, progress.step, fill, state, asdict(progress))


def load(folder: Path) -> tuple[Progress, Table]:
    """Return how far a checkpoint is, and its state.

    Raises FormatError where it is damaged or of another version.
    """

    def taken(about: dict[str, Any], arrays: Table) -> tuple[Progress, Table]:
        place = Place(**about.pop("place"))
        return Progress(place=place, **about), arrays

    return run_folder.load(folder, taken)
