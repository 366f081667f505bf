"""Folders that appear whole or not at all: written aside, synchronised, renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.errors import EdgeR1Error

_DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.int32: "I32", mx.uint32: "U32"}
_DTYPES |= {mx.uint8: "U8", mx.int8: "I8", mx.int64: "I64", mx.bool_: "BOOL"}


class SaveError(EdgeR1Error):
    """Something could not be saved; what was saved before is untouched."""


def write_folder(destination: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new folder that then takes its place, an older folder of that name going.

    Raises SaveError where the disk is full or refuses; nothing of the attempt stays, and an older folder does.
    """
    aside = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        fill(aside)
        for path in (*aside.iterdir(), aside):
            _sync(path)
        if destination.exists():
            old = destination.with_name(f".{destination.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            destination.rename(old)
            aside.rename(destination)
            shutil.rmtree(old, ignore_errors=True)
        else:
            aside.rename(destination)
        _sync(destination.parent)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise SaveError(f"{destination} could not be saved ({reason}); what was there before is untouched.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file. MLX's own writer does not notice a disk that is full; this raises OSError."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
    at = 0
    for name, value in tensors.items():
        header[name] = {
            "dtype": _DTYPES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + value.nbytes],
        }
        at += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for value in tensors.values():
            plain = mx.contiguous(value)
            file.write(np.array(plain.view(mx.uint16) if value.dtype == mx.bfloat16 else plain, copy=False).tobytes())


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
