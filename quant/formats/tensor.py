"""What every tensor of a source has in common, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.numbers import check_finite
from edger1.quant.source import Codes, Coding

Raw = dict[str, RawTensor]
"""The tensors of a source's files that no format has claimed yet, by name."""


@dataclass(frozen=True)
class Context:
    """What the formats are told about a source.

    `settings` is its quantization_config, empty where it has none. `dtype` is what its unquantized weights have.
    `only_finite` makes reading NaN or infinities an error.
    """

    settings: Mapping[str, Any]
    dtype: str
    only_finite: bool


@dataclass(frozen=True)
class StoredTensor:
    """The part of quant/source.py's Tensor that does not depend on the format."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str
    nbytes: int
    only_finite: bool

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files that reading it touches."""
        return tuple(dict.fromkeys(value.path for value in vars(self).values() if isinstance(value, RawTensor)))

    @property
    def coding(self) -> Coding | None:
        """How the codes could be carried over: not at all, unless the format says otherwise."""
        return None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32, integers as they are."""
        # What comes of NaN and infinities is looked at below, or was allowed.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            values = self.values(start, stop)
        return check_finite(self.name, values) if self.only_finite and values.dtype == np.float32 else values

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        raise AssertionError(f"{self.name!r} ({self.kind}) has no codes to carry over")

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) without looking at them."""
        raise NotImplementedError


def take(left: Raw, name: str, beside: str) -> RawTensor:
    """Take tensor `name` out of `left`. Raises FormatError where it is missing though `beside` is there."""
    if name not in left:
        raise FormatError(
            f"{left[beside].path}: tensor {beside[:80]!r} needs {name[-40:]!r} beside it, which is missing; the model "
            "is incomplete. Fetch it again."
        )
    return left.pop(name)


def check_shape(tensor: RawTensor, allowed: Iterable[tuple[int, ...]], beside: RawTensor) -> None:
    """Raise FormatError unless the shape is one of those that go with tensor `beside`."""
    shapes = list(allowed)
    if tensor.shape not in shapes:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name[:80]!r} has the shape {list(tensor.shape)}, but beside "
            f"{beside.name[-40:]!r} of shape {list(beside.shape)} it should have "
            f"{' or '.join(str(list(shape)) for shape in shapes)}. The file is damaged, or of an unknown variant."
        )


def check_dtype(tensor: RawTensor, allowed: tuple[str, ...]) -> None:
    """Raise FormatError unless the dtype is one of `allowed`."""
    if tensor.dtype not in allowed:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name[:80]!r} has the dtype {tensor.dtype}; expected "
            f"{' or '.join(allowed)}. The file is damaged, or of an unknown variant."
        )


def check_matrix(tensor: RawTensor) -> None:
    """Raise FormatError unless the tensor has two axes."""
    if len(tensor.shape) != 2:
        raise FormatError(
            f"{tensor.path}: tensor {tensor.name[:80]!r} has {len(tensor.shape)} dimensions instead of 2; the file is "
            "damaged, or of an unknown variant."
        )
