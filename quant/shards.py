"""Writes model*.safetensors the way mlx-lm lays them out, one tensor in memory at a time.

The container, after the safetensors specification: u64 length of the header, the header as JSON padded with spaces,
then the tensors' bytes back to back. Room for the header is left at the start and filled in when the file is whole, so
that a dtype may be settled when its tensor comes by. Shards hold at most `SHARD_BYTES`, unless one tensor is larger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edger1.quant.formats.ggml import Array
from edger1.quant.writing import write_text


@dataclass(frozen=True)
class Planned:
    """A unit that goes into one shard as a whole: the names of its arrays and an upper bound of their bytes."""

    names: tuple[str, ...]
    max_bytes: int


def header_room(names: Iterable[str]) -> int:
    """Return the bytes to leave for a header over these names: a multiple of 8."""
    # {"dtype":"BF16","shape":[a,b,c,d],"data_offsets":[begin,end]} with numbers of up to 19 digits.
    size = sum(len(json.dumps(name)) + 60 + 6 * 20 for name in names) + 64
    return -(-size // 8) * 8


def split(units: Sequence[Planned], limit: int) -> list[list[Planned]]:
    """Deal the units out to shards, in order."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for unit in units:
        if shards[-1] and filled + unit.max_bytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(unit)
        filled += unit.max_bytes
    return shards


def write(
    folder: Path, shards: Sequence[Sequence[Planned]], tensors: Iterator[dict[str, Array]], parameters: int
) -> list[str]:
    """Write the arrays of each unit, as `tensors` yields them, and the index; return the file names.

    Every file is on the disk (fsync) when this returns.
    """
    files = [_file_name(i, len(shards)) for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    total = 0
    for file_name, units in zip(files, shards, strict=True):
        with (folder / file_name).open("xb") as file:
            room = header_room(name for unit in units for name in unit.names)
            entries: dict[str, dict[str, object]] = {}
            file.seek(8 + room)
            at = 0
            for unit in units:
                arrays = next(tensors)
                if tuple(arrays) != unit.names:
                    raise AssertionError(f"planned {unit.names} but got {tuple(arrays)}")
                for name, array in arrays.items():
                    file.write(np.ascontiguousarray(array.data).data.cast("B"))
                    end = at + array.data.nbytes
                    entries[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [at, end]}
                    weight_map[name] = file_name
                    at = end
            _finish(file, entries, room)
        total += at
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=4))
    return files


def _finish(file: BinaryIO, entries: dict[str, dict[str, object]], room: int) -> None:
    header = json.dumps({"__metadata__": {"format": "mlx"}, **entries}, separators=(",", ":")).encode()
    if len(header) > room:
        raise AssertionError(f"a header of {len(header)} bytes does not fit in {room}")
    file.seek(0)
    file.write(room.to_bytes(8, "little") + header.ljust(room))
    file.flush()
    os.fsync(file.fileno())


def _file_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
