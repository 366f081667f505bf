"""Checkpoints of a run: a model folder with the state of training beside it.

    RUN/checkpoints/step-00000500/
        config.json, model.safetensors, mtp.safetensors, tokenizer files      the model in bf16, ready to use
        training.safetensors      weights and optimizer state in f32
        training.json             step, place in the data, what was seen, the settings

A checkpoint is written aside and renamed, and the last two are kept, so there is a good one at every moment. From it
a run goes on to the very losses that it would have had without a stop.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from edger1.errors import FormatError
from edger1.train.folder_writer import write_folder, write_tensors
from edger1.train.pretrain import export
from edger1.train.pretrain.packing import Place

KEPT = 2
_FORMAT = 1


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    """Tokens of documents that were predicted from, padding not counted."""
    place: Place = field(default_factory=Place)
    seconds: float = 0.0
    """Time spent in steps."""


def save(
    run: Path, progress: Progress, model: Any, config: dict[str, Any], tokenizer: Path, state: dict[str, mx.array]
) -> Path:
    """Save a checkpoint and drop those before the last two; return its folder.

    `state` is everything in f32, under names of its own. Raises SaveError, after which earlier checkpoints are whole.
    """
    folder = run / "checkpoints" / f"step-{progress.step:08d}"

    def fill(aside: Path) -> None:
        export.fill(aside, model, config, tokenizer)
        write_tensors(aside / "training.safetensors", state)
        about = {"format": _FORMAT, **asdict(progress)}
        (aside / "training.json").write_text(json.dumps(about, indent=1), encoding="utf-8")

    write_folder(folder, fill)
    for old in _all(run)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


def latest(run: Path) -> Path | None:
    """Return the newest checkpoint of a run, or None."""
    found = _all(run)
    return found[-1] if found else None


def load(folder: Path) -> tuple[Progress, dict[str, mx.array]]:
    """Return how far a checkpoint is, and its state.

    Raises FormatError where it is damaged or of another version.
    """
    try:
        about = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        if about.pop("format") != _FORMAT:
            raise FormatError(f"{folder} was saved by another version of EdgeR1; start the run afresh.")
        place = Place(**about.pop("place"))
        state = cast(dict[str, mx.array], mx.load(str(folder / "training.safetensors")))
        mx.eval(list(state.values()))
        return Progress(place=place, **about), state
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"{folder} is no whole checkpoint ({error}); remove it to go on from the one before."
        ) from None


def _all(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*"))
