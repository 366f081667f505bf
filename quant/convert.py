"""Converts a GGUF file into one model folder that mlx-lm loads, without changing a number.

The folder is written beside its destination under a name that begins with a dot and takes its own name when everything
is on the disk, so that a stop at any moment leaves nothing that could be taken for a model. The next conversion to the
same destination clears what an interrupted one left. The source is only ever read.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.quant import gguf_models, gguf_rope, journal, shards, tokenizer
from edger1.quant.formats import ggml
from edger1.quant.formats.gguf import Header
from edger1.quant.formats.gguf_parts import GGUFParts
from edger1.quant.gguf_outline import Placement
from edger1.quant.writing import SHARD_BYTES, sync_path, write_text

SMALL_FILES_BYTES = 64 << 20
"""What is set aside for tokenizer and configuration when the free space is checked."""


@dataclass(frozen=True)
class CarriedTensor:
    """One tensor's way: `kind` is its GGUF type, `how` says what became of its numbers."""

    source: str
    target: str
    kind: str
    how: str


@dataclass(frozen=True)
class Report:
    """What a conversion did. Every tensor in `tensors` was carried over without loss; there are no others."""

    folder: Path
    model_type: str
    tensors: tuple[CarriedTensor, ...]
    files: tuple[str, ...]
    weight_bytes: int

    def summary(self) -> str:
        """Say in one line how many tensors of which type were carried over how."""
        counted = Counter((tensor.kind, tensor.how) for tensor in self.tensors)
        return "; ".join(f"{count} {kind} {how}" for (kind, how), count in counted.most_common())


def convert_gguf(source: Path, destination: Path, on_progress: Callable[[int, int], None] | None = None) -> Report:
    """Convert the GGUF file `source` into the folder `destination`, which must not exist yet.

    `on_progress(done, total)` hears of bytes of tensor data read. Raises FormatError for a file that is damaged or of
    a kind that cannot be carried over without loss, UsageError for a destination that exists, EdgeR1Error where the
    disk is full or may not be written to. In each case nothing is left at the destination.
    """
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists already; remove it or choose another folder.")
    with GGUFParts(source) as file:
        layout = gguf_models.plan(file.header, gguf_rope.read_factors(file))
        units = _plan_units(file.header, layout)
        built = tokenizer.build(file.header, layout.config["vocab_size"])
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            _check_space(destination.parent, units)
            with journal.working(destination, restart=True) as folder:
                return _write(file, layout, units, built, folder, destination, on_progress)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise EdgeR1Error(
                    f"The disk under {destination.parent} became full while {source.name} was being converted; "
                    "make room and try again. Nothing half-done was kept."
                ) from error
            raise EdgeR1Error(f"{destination} cannot be written: {(error.strerror or str(error)).lower()}.") from error


def _write(
    file: GGUFParts,
    layout: gguf_models.Plan,
    units: list[shards.Planned],
    built: tokenizer.BuiltTokenizer,
    folder: Path,
    destination: Path,
    on_progress: Callable[[int, int], None] | None,
) -> Report:
    header = file.header
    tensors = [header.tensors[placement.source] for placement in layout.placements]
    carried: list[CarriedTensor] = []
    formats: dict[str, tuple[int, str]] = {}
    total = sum(tensor.nbytes for tensor in tensors)

    def arrays() -> Iterator[dict[str, ggml.Array]]:
        done = 0
        for placement, tensor in zip(layout.placements, tensors, strict=True):
            result = ggml.carry(tensor.name, tensor.type, file.read(tensor), tensor.shape)
            parts = {suffix: _arranged(part, placement) for suffix, part in result.parts.items()}
            if result.bits is not None and result.mode is not None:
                formats[placement.target.removesuffix(".weight")] = result.bits, result.mode
            how = "copied" if result.bits is None else f"codes kept, {result.bits} bits in groups of {ggml.GROUP_SIZE}"
            if placement.heads is not None:
                how += ", rows reordered"
            if placement.shift:
                how = f"plus {placement.shift:g}"
            carried.append(CarriedTensor(tensor.name, placement.target, tensor.type.name, how))
            done += tensor.nbytes
            if on_progress is not None:
                on_progress(done, total)
            yield {_part_name(placement.target, suffix): part for suffix, part in parts.items()}

    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    files = shards.write(folder, shards.split(units, SHARD_BYTES), arrays(), parameters)
    built.write(folder)
    # Last, because without config.json nothing takes the folder for a model.
    write_text(folder / "config.json", json.dumps(_config(layout, built, formats), indent=4) + "\n")
    for entry in folder.iterdir():
        sync_path(entry)
    sync_path(folder)
    if os.path.lexists(destination):
        raise UsageError(f"{destination} appeared while {file.path.name} was being converted; nothing was replaced.")
    weight_bytes = sum((folder / name).stat().st_size for name in files)
    folder.rename(destination)
    sync_path(destination.parent)
    return Report(destination, layout.config["model_type"], tuple(carried), tuple(files), weight_bytes)


def _arranged(part: ggml.Array, placement: Placement) -> ggml.Array:
    """Put an array into the order, range and shape that the target has."""
    data = part.data
    if placement.heads is not None:
        data = data[gguf_models.restored_rows(len(data), placement.heads)]
    if placement.shift:
        data = data + np.float32(placement.shift)
    return ggml.Array(part.dtype, data[None] if placement.one_row else data)


def _plan_units(header: Header, layout: gguf_models.Plan) -> list[shards.Planned]:
    units = []
    for placement in layout.placements:
        tensor = header.tensors[placement.source]
        ggml.check_type(tensor.name, tensor.type, tensor.shape)
        if placement.values is not None or (placement.shift and tensor.type.name != "F32"):
            raise FormatError(
                f"{header.name}: tensor {tensor.name!r} cannot be carried over without computing with its numbers; "
                "convert the file with a recipe."
            )
        suffixes = ggml.part_names(tensor.type)
        names = tuple(_part_name(placement.target, suffix) for suffix in suffixes)
        units.append(shards.Planned(names, ggml.carried_bytes(tensor.type, tensor.shape)))
    return units


def _part_name(target: str, suffix: str) -> str:
    return f"{target.removesuffix('.weight')}.{suffix}" if suffix else target


def _config(
    layout: gguf_models.Plan, built: tokenizer.BuiltTokenizer, formats: dict[str, tuple[int, str]]
) -> dict[str, Any]:
    config = {**layout.config, **built.token_ids()}
    if formats:
        common = Counter(formats.values()).most_common(1)[0][0]
        quantization: dict[str, Any] = _as_quantization(*common)
        quantization |= {path: _as_quantization(*kind) for path, kind in formats.items() if kind != common}
        # mlx-lm writes both: its own reader takes the first, transformers looks for the second.
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def _as_quantization(bits: int, mode: str) -> dict[str, Any]:
    return {"group_size": ggml.GROUP_SIZE, "bits": bits, "mode": mode}


def _check_space(parent: Path, units: list[shards.Planned]) -> None:
    needed = sum(unit.max_bytes + shards.header_room(unit.names) for unit in units) + SMALL_FILES_BYTES
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise EdgeR1Error(
            f"Converting needs up to {needed / 1e6:,.0f} MB under {parent}, but only {free / 1e6:,.0f} MB are free; "
            "make room or choose another disk."
        )
