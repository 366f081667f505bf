"""8-bit floats with scales, in all the shapes that scales come in: value = float8 * scale.

The scales of a weight stand beside it under its name with a suffix: `_scale_inv` (DeepSeek's reports and code, where it
is what to multiply by, too) or `_scale` (compressed-tensors, ModelOpt, fbgemm). They are one number a tensor, one a row
(any axis of length 1 is stretched), or one a block of the last two axes, 128 x 128 unless the config says otherwise.
Scales of activations are settings of how to compute and no part of the weights.

E4M3 whose scales are powers of two, in blocks of a multiple of 32 columns, is what MLX calls mxfp8; the numbers can be
kept. Scales of one byte are such powers (E8M0), and so are float32 scales where the config says so ("ue8m0").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.ggml import Array
from edger1.quant.formats.numbers import decode_e8m0, decode_fp8
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, StoredTensor, check_dtype, check_shape
from edger1.quant.source import Codes, Coding, Tensor

_KINDS = ("F8_E4M3", "F8_E5M2")
_SUFFIXES = ("_scale_inv", "_scale")
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_EXPONENTS = ("F8_E8M0", "U8")


@dataclass(frozen=True)
class ScaledTensor(StoredTensor):
    """A tensor of 8-bit floats; `block` is the block's rows and columns, None where the scales are stretched."""

    raw: RawTensor
    scale: RawTensor
    block: tuple[int, int] | None
    powers_of_two: bool

    @property
    def coding(self) -> Coding | None:
        """MLX's mxfp8, where the scales are powers of two and its groups lie within the blocks."""
        within = self.block is not None and self.block[1] % 32 == 0 and self.shape[-1] % 32 == 0
        fits = within and self.powers_of_two and self.raw.dtype == "F8_E4M3" and len(self.shape) > 1
        return Coding("mxfp8", 8, 32, "U8", None) if fits else None

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        assert self.block is not None
        raw = self.raw.rows(start, stop)
        if self.only_finite and (raw & 0x7F == 0x7F).any():
            raise FormatError(f"{self.raw.path}: tensor {self.name!r} holds NaN; get another copy of the model.")
        scales = np.empty((*raw.shape[:-1], raw.shape[-1] // 32), np.uint8)
        for matrix, scale, offset in self._matrices(scales, start, stop):
            wide = np.repeat(self._exponents(scale), self.block[1] // 32, axis=1)[:, : matrix.shape[1]]
            for span, row in _spans(len(matrix), offset, self.block[0]):
                matrix[span] = wide[row]
        return Codes(Array("U32", raw.view("<u4")), Array("U8", scales), None)

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) times their scales."""
        out = decode_fp8(self.raw.rows(start, stop), self.raw.dtype)
        if self.block is None:
            out *= self._stretched(start, stop)
            return out
        rows, columns = self.block
        for matrix, scale, offset in self._matrices(out, start, stop):
            wide = np.repeat(scale, columns, axis=1)[:, : matrix.shape[1]]
            for span, row in _spans(len(matrix), offset, rows):
                matrix[span] *= wide[row]
        return out

    def _matrices(self, out: np.ndarray, start: int, stop: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Yield the matrices of `out`, rows [start, stop), with its scales and its first row's place in a block."""
        assert self.block is not None
        rows = self.block[0]
        if len(self.shape) == 2:
            first = start // rows
            yield out, self._numbers(self.scale.rows(first, -(-stop // rows))), start - first * rows
        else:
            scales = self._numbers(self.scale.rows(start, stop))
            stacked = out.reshape(-1, *out.shape[-2:]), scales.reshape(-1, *scales.shape[-2:])
            for matrix, scale in zip(*stacked, strict=True):
                yield matrix, scale, 0

    def _exponents(self, scale: np.ndarray) -> np.ndarray:
        """Return powers of two as E8M0."""
        fraction, exponent = np.frexp(scale)
        byte = exponent + 126
        if not ((fraction == 0.5) & (byte >= 0) & (byte < 255)).all():
            raise FormatError(
                f"{self.scale.path}: tensor {self.scale.name[:80]!r} holds scales that are no powers of two, although "
                "config.json says so (scale_fmt); correct that there and convert again."
            )
        return byte.astype(np.uint8)

    def _stretched(self, start: int, stop: int) -> np.ndarray:
        by_row = len(self.scale.shape) > 0 and self.scale.shape[0] == self.shape[0] > 1
        scales = self._numbers(self.scale.rows(start, stop) if by_row else self.scale.all())
        if scales.ndim <= 1 and not by_row:
            return scales.reshape(())
        return scales.reshape(*scales.shape, *([1] * (len(self.shape) - scales.ndim)))

    def _numbers(self, raw: np.ndarray) -> np.ndarray:
        return decode_e8m0(raw) if self.scale.dtype in _EXPONENTS else decode(raw, self.scale.dtype)


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
        block = _block(raw, scale, context.settings)
        if block is not None:
            form = f"{block[0]}x{block[1]}"
        else:
            form = "per tensor" if np.prod(scale.shape) == 1 else "per channel"
        kind, nbytes = f"{raw.dtype} {form}", raw.nbytes + scale.nbytes
        powers = scale.dtype in _EXPONENTS or context.settings.get("scale_fmt") == "ue8m0"
        found[name] = ScaledTensor(
            name, raw.shape, context.dtype, kind, nbytes, context.only_finite, raw, scale, block, powers
        )
    return found


def _stretches(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    if scale in ((), (1,), shape[:1]):
        return True
    return len(shape) == len(scale) and all(have in (1, full) for have, full in zip(scale, shape, strict=True))


def _block(raw: RawTensor, scale: RawTensor, settings: Any) -> tuple[int, int] | None:
    """Return the size of a block, None where the scales are stretched. Raises FormatError where they fit in no way."""
    given = block_size(settings)
    block = given or (128, 128)
    fitting = None
    if len(raw.shape) > 1:
        *lead, rows, columns = raw.shape
        fitting = (*lead, -(-rows // block[0]), -(-columns // block[1]))
    if _stretches(raw.shape, scale.shape) and not (given and scale.shape == fitting):
        return None
    check_shape(scale, [fitting] if fitting is not None else [(), (1,), raw.shape], raw)
    return block


def block_size(settings: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a block as the config gives them. Raises FormatError for nonsense."""
    value = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    for group in groups.values() if value is None and isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict) and weights.get("strategy") == "group":
            value = [1, weights.get("group_size")]
        elif isinstance(weights, dict):
            value = weights.get("block_structure")
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 1 << 20 for n in value)):
        raise FormatError(f"config.json gives {str(value)[:40]!r} as the size of its blocks; expected two numbers.")
    return value[0], value[1]
