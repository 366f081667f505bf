"""The matrices of a model's linear layers as f32 rows, a few at a time, wherever and however they are kept.

A matrix of a folder is read as it lies in the files: a row window of a tensor, or an expert of a stacked one, is one
range of bytes, which is dequantized here. What the files hold under other names or in other shapes than the model has
(checkpoints that mlx-lm's `sanitize` rewrites) comes out of the model's own arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats import safetensors


class Matrices(Protocol):
    """Where the matrices of modules are had from. `module` is at `path` in mlx-lm's model."""

    def shape(self, path: str, module: Any) -> tuple[int, ...]:
        """Return [rows, columns], or [experts, rows, columns] of a stack, of numbers and not of codes."""
        ...

    def rows(self, path: str, module: Any, expert: int | None, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) of a matrix as f32; `expert` is the matrix of a stack, None where there is one."""
        ...


class FolderMatrices:
    """The matrices of a model folder, whose modules mlx-lm has built lazily."""

    def __init__(self, files: Sequence[Path]) -> None:
        headers = [safetensors.read_header(file) for file in files]
        self._where: Mapping[str, tuple[Path, safetensors.Entry]] = {
            name: (header.path, entry) for header in headers for name, entry in header.entries.items()
        }

    def shape(self, path: str, module: Any) -> tuple[int, ...]:
        """See Matrices."""
        held = tuple(module["weight"].shape)
        return held if "scales" not in module else (*held[:-1], held[-1] * 32 // module.bits)

    def rows(self, path: str, module: Any, expert: int | None, start: int, stop: int) -> np.ndarray:
        """See Matrices."""
        import mlx.core as mx

        weight = self._part(path, module, "weight", expert, start, stop)
        if "scales" not in module:
            return _numpy(weight)
        scales = self._part(path, module, "scales", expert, start, stop)
        biases = None if module.get("biases") is None else self._part(path, module, "biases", expert, start, stop)
        affine = module.mode == "affine"
        plain = mx.dequantize(
            weight,
            scales.astype(mx.float32) if affine else scales,
            biases if biases is None else biases.astype(mx.float32),
            group_size=module.group_size,
            bits=module.bits,
            mode=module.mode,
            global_scale=module.get("global_scale"),
            dtype=mx.float32,
        )
        return _numpy(plain)

    def _part(self, path: str, module: Any, name: str, expert: int | None, start: int, stop: int) -> Any:
        array = module[name]
        found = self._where.get(f"{path}.{name}")
        if found is None or found[1].shape != tuple(array.shape):
            return array[start:stop] if expert is None else array[expert, start:stop]
        return _read(*found, expert, start, stop)


def _read(file: Path, entry: safetensors.Entry, expert: int | None, start: int, stop: int) -> Any:
    import mlx.core as mx

    columns = entry.nbytes // int(np.prod(entry.shape[:-1]))
    first = start if expert is None else expert * entry.shape[-2] + start
    with file.open("rb") as opened:
        opened.seek(entry.offset + first * columns)
        raw = opened.read((stop - start) * columns)
    if len(raw) != (stop - start) * columns:
        raise FormatError(f"{file} became shorter while {entry.name} was being read; fetch it again.")
    kinds = {"U32": np.uint32, "U8": np.uint8, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    if entry.dtype not in kinds:
        raise FormatError(f"{file} holds {entry.name} as {entry.dtype}; expected one of {', '.join(kinds)}.")
    array = mx.array(np.frombuffer(raw, kinds[entry.dtype]).reshape(stop - start, -1))
    return array.view(mx.bfloat16) if entry.dtype == "BF16" else array


def _numpy(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(array.astype(mx.float32))
