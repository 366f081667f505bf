"""A source of tensors that are in memory, as the readers of formats give those that are in files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from edger1.quant.expressions import dtype_name, to_numpy
from edger1.quant.formats.ggml import Array
from edger1.quant.source import Codes, Coding


@dataclass(frozen=True, eq=False)
class ArrayTensor:
    """An array as a `Tensor` of a source; `reads` are the rows that were asked for."""

    name: str
    array: mx.array
    coding: Coding | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)
    kind: str = "array"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> str:
        return dtype_name(self.array.dtype)

    @property
    def nbytes(self) -> int:
        return int(self.array.nbytes)

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= (self.shape[0] if self.shape else 1), (self.name, start, stop)
        self.reads.append((start, stop))
        return to_numpy(self.array[start:stop] if self.shape else self.array)

    def codes(self, start: int, stop: int) -> Codes:
        """Codes that say where they are from: the number of each run along the last axis, everywhere in it."""
        assert self.coding is not None
        columns = self.shape[-1]
        runs = np.arange(math.prod(self.shape[:-1]), dtype=np.uint32).reshape(*self.shape[:-1], 1)[start:stop]
        weight = np.repeat(runs + self.seed, columns * self.coding.bits // 32, axis=-1)
        scales = np.repeat(runs + self.seed, columns // self.coding.group_size, axis=-1).astype(np.float32)
        return Codes(Array("U32", weight), Array("F32", scales), Array("F32", -scales))

    @property
    def seed(self) -> int:
        return sum(self.name.encode()) * 1000


def tensors(arrays: Mapping[str, mx.array], coding: Coding | None = None) -> dict[str, ArrayTensor]:
    return {name: ArrayTensor(name, array, coding if array.ndim > 1 else None) for name, array in arrays.items()}
