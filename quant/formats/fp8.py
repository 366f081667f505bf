"""8-bit floats with scales, in all the shapes that scales come in: value = float8 * scale.

The scales of a weight stand beside it under its name with a suffix: `_scale_inv` (DeepSeek's reports and code, where it
is what to multiply by, too) or `_scale` (compressed-tensors, ModelOpt, fbgemm). They are one number a tensor, one a row
(any axis of length 1 is stretched), or one a block of the last two axes, 128 x 128 unless the config says otherwise.
Scales of activations are settings of how to compute and no part of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.numbers import decode_e8m0, decode_fp8
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, StoredTensor, check_dtype, check_shape
from edger1.quant.source import Tensor

_KINDS = ("F8_E4M3", "F8_E5M2")
_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A tensor of 8-bit floats; `block` is the block's rows and columns, None where the scales are stretched."""

    raw: RawTensor
    scale: RawTensor
    block: tuple[int, int] | None

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) times their scales."""
        out = decode_fp8(self.raw.rows(start, stop), self.raw.dtype)
        if self.block is None:
            out *= self._stretched(start, stop)
            return out
        rows, columns = self.block
        if len(self.shape) == 2:
            first = start // rows
            scales = self._numbers(self.scale.rows(first, -(-stop // rows)))
            matrices = [(out, scales, start - first * rows)]
        else:
            scales = self._numbers(self.scale.rows(start, stop))
            flat = scales.reshape(-1, *scales.shape[-2:])
            matrices = [(m, s, 0) for m, s in zip(out.reshape(-1, *self.shape[-2:]), flat, strict=True)]
        for matrix, scale, offset in matrices:
            wide = np.repeat(scale, columns, axis=1)[:, : matrix.shape[1]]
            for span, row in _spans(len(matrix), offset, rows):
                matrix[span] *= wide[row]
        return out

    def _stretched(self, start: int, stop: int) -> np.ndarray:
        by_row = len(self.scale.shape) > 0 and self.scale.shape[0] == self.shape[0] > 1
        scales = self._numbers(self.scale.rows(start, stop) if by_row else self.scale.all())
        if scales.ndim <= 1 and not by_row:
            return scales.reshape(())
        return scales.reshape(*scales.shape, *([1] * (len(self.shape) - scales.ndim)))

    def _numbers(self, raw: np.ndarray) -> np.ndarray:
        return decode_e8m0(raw) if self.scale.dtype == "F8_E8M0" else decode(raw, self.scale.dtype)


def _spans(count: int, offset: int, block: int) -> Iterator[tuple[slice, int]]:
    """Split `count` rows, the first of which is row `offset` of its block, at the ends of blocks."""
    at = 0
    while at < count:
        row = (at + offset) // block
        end = min(count, (row + 1) * block - offset)
        yield slice(at, end), row
        at = end


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take the 8-bit floats that have scales beside them."""
    found: dict[str, Tensor] = {}
    for name in list(left):
        suffix = next((suffix for suffix in _SUFFIXES if name + suffix in left), None)
        if suffix is None or left[name].dtype not in _KINDS:
            continue
        raw, scale = left.pop(name), left.pop(name + suffix)
        check_dtype(scale, _SCALE_DTYPES)
        block = None if _stretches(raw.shape, scale.shape) else _block(raw, scale, context.settings)
        if block is not None:
            form = f"{block[0]}x{block[1]}"
        else:
            form = "per tensor" if np.prod(scale.shape) == 1 else "per channel"
        kind, nbytes = f"{raw.dtype} {form}", raw.nbytes + scale.nbytes
        found[name] = ScaledTensor(name, raw.shape, context.dtype, kind, nbytes, context.only_finite, raw, scale, block)
    return found


def _stretches(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    if scale in ((), (1,), shape[:1]):
        return True
    return len(shape) == len(scale) and all(have in (1, full) for have, full in zip(scale, shape, strict=True))


def _block(raw: RawTensor, scale: RawTensor, settings: Any) -> tuple[int, int]:
    block = block_size(settings) or (128, 128)
    if len(raw.shape) < 2:
        raise FormatError(f"{raw.path}: tensor {raw.name[:80]!r} has {len(raw.shape)} dimensions but scales by block.")
    *lead, rows, columns = raw.shape
    check_shape(scale, [(*lead, -(-rows // block[0]), -(-columns // block[1]))], raw)
    return block


def block_size(settings: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block as the config gives them. Raises FormatError for nonsense."""
    value = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    if value is None and isinstance(groups, dict):
        weights = (group.get("weights") for group in groups.values() if isinstance(group, dict))
        value = next((w.get("block_structure") for w in weights if isinstance(w, dict)), None)
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in value)):
        raise FormatError(f"config.json gives {str(value)[:40]!r} as its weight_block_size; expected two numbers.")
    return value[0], value[1]
