"""Converts a source of any format into a model folder that mlx-lm loads, a window of rows in memory at a time.

What becomes of each array is planned first (quant/planning.py), then carried out unit by unit into a hidden folder
beside the destination (quant/running.py), which takes its name when it is whole; a stop at any moment leaves it hidden,
and the same conversion started again goes on from there. The source is only ever read.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.quant import journal
from edger1.quant.planning import Model, Plan, plan
from edger1.quant.recipes import Recipe
from edger1.quant.running import Importance, Local, OnProgress, Options, Supply, run
from edger1.quant.source import Source
from edger1.quant.writing import INDEX, PART, SHARD_BYTES, index, sync_path, write_text
from edger1.units import format_bytes

REPORT = "conversion.json"
"""What was done with each tensor, beside the model; mlx-lm does not look at it."""
SMALL_FILES_BYTES = 64 << 20
"""What is set aside for tokenizer and configuration when the free space is checked."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Settings:
    """How to convert. `importance` and what made it (`calibration`, for the record) come from calibrating.

    `zero_nonfinite` makes zeros of NaN and infinities, which otherwise are an error. `restart` throws away what an
    interrupted conversion left, `renew` does so where it was one of something else. `extra_bytes` are needed on the
    disk beside the output. `keep_journal` is for who puts the folder somewhere else: until `journal.drop` it can be
    given back to the next conversion (`journal.take_back`), which then has nothing left to do.
    """

    zero_nonfinite: bool = False
    restart: bool = False
    renew: bool = False
    keep_journal: bool = False
    threads: int | None = None
    shard_bytes: int = SHARD_BYTES
    importance: Importance | None = None
    calibration: str | None = None
    extra_bytes: int = 0
    supply: Supply = field(default_factory=Local)


@dataclass(frozen=True)
class Made:
    """One array's way: `kind` is how the source stored it, `how` what became of it."""

    name: str
    kind: str
    how: str
    carried: bool


@dataclass(frozen=True)
class Report:
    """What a conversion did. `tensors` are the model's arrays, `ahead` those of its multi-token prediction layers."""

    folder: Path
    model_type: str
    recipe: str
    tensors: tuple[Made, ...]
    ahead: tuple[Made, ...]
    dropped: tuple[str, ...]
    zeroed: tuple[str, ...]
    bits_per_weight: float
    weight_bytes: int

    def summary(self) -> str:
        """Say in one line how many arrays of which kind became what."""
        counted = Counter((made.kind, made.how) for made in self.tensors)
        return "; ".join(f"{count} {kind}: {how}" for (kind, how), count in counted.most_common())


def convert(
    source: Source,
    model: Model,
    destination: Path,
    recipe: Recipe,
    settings: Settings | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Convert `source`, of which `model` says what its tensors make, into the folder `destination`.

    `on_progress(done, total)` hears of bytes written. Raises UsageError for a destination that exists or an interrupted
    conversion of something else, FormatError for a damaged source, EdgeR1Error where the disk is full or may not be
    written to. What was done until then is kept for the next call.
    """
    settings = settings or Settings()
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists already; remove it or choose another folder.")
    made = planned(source, model, recipe, settings.shard_bytes)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with journal.working(destination, restart=settings.restart) as folder:
            digest = f"{made.digest}-{settings.calibration}" if settings.calibration else made.digest
            begun = journal.begun(folder, source.fingerprint, digest, renew=settings.renew)
            check_space(made, folder, settings.extra_bytes)
            options = Options(settings.threads or default_threads(), settings.zero_nonfinite, settings.importance)
            ended = run(made, folder, begun, options, settings.supply, on_progress or (lambda done, total: None))
            report = _report(source, made, destination, recipe, ended.zeroed)
            _finish(source, made, folder, report, settings)
            if os.path.lexists(destination):
                raise UsageError(f"{destination} appeared while it was being made; nothing was replaced.")
            # The journal goes last: without it, what is there would be taken for nothing and thrown away.
            folder.rename(destination)
            if not settings.keep_journal:
                journal.drop(destination)
            sync_path(destination.parent)
    except OSError as error:
        if error.errno in _FULL:
            raise EdgeR1Error(
                f"The disk under {destination.parent} became full while {source.name} was being converted. What was "
                "done is kept: make room and start the same conversion again."
            ) from error
        raise EdgeR1Error(f"{destination} cannot be written: {(error.strerror or str(error)).lower()}.") from error
    return report


def planned(source: Source, model: Model, recipe: Recipe, shard_bytes: int = SHARD_BYTES) -> Plan:
    """Return what `convert` would carry out. Raises FormatError where there is nothing to convert."""
    order = {name: rank for rank, name in enumerate(source.tensors)}
    made = plan(model, recipe, order, shard_bytes)
    if not made.jobs:
        raise FormatError(f"{source.name} holds nothing that mlx-lm's {source.config.get('model_type')} is made of.")
    return made


def default_threads() -> int:
    """Return how many threads convert: one more than processors, so that reading and writing find one; five at most."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, 4) + 1


def check_space(made: Plan, folder: Path, extra_bytes: int = 0) -> None:
    """Raise EdgeR1Error unless what is still to be written to `folder` fits on its disk."""
    files = {shard.file: shard.nbytes for shard in (*made.shards, *made.ahead)}
    there = 0
    for name in files:
        for path in (folder / name, folder / (name + PART)):
            if path.is_file():
                # What is really taken: a file that was made at full length may have holes.
                there += min(path.stat().st_blocks * 512, files[name])
    needed = sum(files.values()) - there + SMALL_FILES_BYTES + extra_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise EdgeR1Error(
            f"Converting needs {format_bytes(needed, up=True)} on the disk of {folder.parent}, but only "
            f"{format_bytes(free)} are free; make room or choose another disk."
        )


def _finish(source: Source, made: Plan, folder: Path, report: Report, settings: Settings) -> None:
    """Write everything that is no weight, config.json last: without it nothing takes a folder for a model."""
    for path in source.companions:
        shutil.copyfile(path, folder / path.name)
    write_text(folder / INDEX, index(made.shards, made.parameters))
    write_text(folder / REPORT, json.dumps(_record(source, report, settings), indent=1) + "\n")
    config = dict(source.config)
    if quantization := made.quantization():
        # mlx-lm writes both: its own reader takes the first, transformers looks for the second.
        config |= {"quantization": quantization, "quantization_config": quantization}
    for entry in folder.iterdir():
        sync_path(entry)
    write_text(folder / "config.json", json.dumps(config, indent=4) + "\n")


def _record(source: Source, report: Report, settings: Settings) -> dict[str, Any]:
    """Return the report as it lies beside the model: nothing in it differs from one run to the next."""
    said = {key: value for key, value in asdict(report).items() if key not in ("folder", "tensors", "ahead")}
    if settings.calibration:
        said["calibration"] = settings.calibration
    said["tensors"] = {made.name: f"{made.kind}: {made.how}" for made in (*report.tensors, *report.ahead)}
    return {"source": source.name, **said}


def _report(source: Source, made: Plan, destination: Path, recipe: Recipe, zeroed: tuple[str, ...]) -> Report:
    inside = {output.name for shard in made.shards for output in shard.outputs}
    tensors: list[Made] = []
    ahead: list[Made] = []
    for job in made.jobs:
        one = Made(job.target.name, job.kind(source.tensors), job.how, job.carried)
        (tensors if next(iter(job.outputs.values())).name in inside else ahead).append(one)
    return Report(
        folder=destination,
        model_type=str(source.config.get("model_type")),
        recipe=recipe.name,
        tensors=tuple(tensors),
        ahead=tuple(ahead),
        dropped=made.dropped,
        zeroed=zeroed,
        bits_per_weight=made.bits_per_weight,
        weight_bytes=made.output_bytes,
    )
