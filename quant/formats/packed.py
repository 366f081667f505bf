"""Whole numbers as compressed-tensors stores them: packed ("pack-quantized") and byte by byte ("int-quantized").

Packed: `X.weight_packed` I32 [n, k * bits / 32] with the codes along the inputs, `X.weight_scale` [n, groups] (one
group a row where the scales are per channel, or one number in all), `X.weight_shape` I64 [2], and where the codes are
not symmetric `X.weight_zero_point` I32 [n * bits / 32, groups], packed along the outputs. Codes and zero points are
stored with 2^(bits-1) added.

Bytes: `X.weight` I8 [n, k] with `X.weight_scale` [n, 1] or one number, and `X.weight_zero_point` I8 like the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.gptq import SCALES
from edger1.quant.formats.numbers import unpack
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, check_dtype, check_matrix, check_shape, take
from edger1.quant.formats.zero_point import ZeroPointTensor
from edger1.quant.source import Tensor


@dataclass(frozen=True)
class PackedTensor(ZeroPointTensor):
    """See the module; `zero_point` is None where the zero point is 2^(bits-1) throughout."""

    packed: RawTensor
    zero_point: RawTensor | None

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop)."""
        rows = self.packed.rows(start, stop)
        if self.packed.dtype == "I8":
            return rows.view(np.uint8) ^ np.uint8(0x80)
        return unpack(rows.view(np.uint32), self.bits)[:, : self.shape[1]]

    def read_words(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop), which are packed as MLX has them."""
        rows = self.packed.rows(start, stop).view(np.uint32)
        return rows ^ np.uint32(0x80808080) if self.packed.dtype == "I8" else rows

    def read_scales(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and zero points of rows [start, stop)."""
        scales = decode(_rows(self.scale, self.shape[0], start, stop), self.scale.dtype)
        if self.zero_point is None:
            return scales, np.full(scales.shape, 1 << self.bits - 1, np.uint8)
        if self.zero_point.dtype == "I8":
            return scales, _rows(self.zero_point, self.shape[0], start, stop).view(np.uint8) ^ np.uint8(0x80)
        first = start // 32 * 32
        words = self.zero_point.rows(first * self.bits // 32, -(-stop * self.bits // 32))
        zeros = unpack(np.ascontiguousarray(words.T).view(np.uint32), self.bits)
        return scales, zeros[:, start - first : stop - first].T


def _rows(tensor: RawTensor, rows: int, start: int, stop: int) -> np.ndarray:
    """Return rows [start, stop) of [n, groups], or of one number that stands for all of them."""
    if tensor.shape[:1] == (rows,):
        part = tensor.rows(start, stop)
        return part.reshape(len(part), tensor.shape[1] if len(tensor.shape) > 1 else 1)
    return np.broadcast_to(tensor.all().reshape(1, 1), (stop - start, 1)).copy()


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take the packed weights and those of 8-bit whole numbers with scales."""
    found: dict[str, Tensor] = {}
    for part in list(left):
        if part.endswith(".weight_packed") and left[part].dtype == "I32":
            path = part.removesuffix(".weight_packed")
        elif part.endswith(".weight") and left[part].dtype == "I8" and f"{part}_scale" in left:
            path = part.removesuffix(".weight")
        else:
            continue
        scale = take(left, f"{path}.weight_scale", part)
        packed = left.pop(part)
        order, zero_point = left.pop(f"{path}.weight_g_idx", None), left.pop(f"{path}.weight_zero_point", None)
        shape = left.pop(f"{path}.weight_shape", None)
        check_matrix(packed)
        check_dtype(scale, SCALES)
        rows, width = packed.shape
        if packed.dtype == "I8":
            bits, group_size, columns = 8, max(width, 1), width
        else:
            bits, group_size, columns = _scheme(context.settings, packed, scale)
            columns = _check_columns(shape, packed, columns)
        groups = -(-columns // group_size)
        shapes = [(rows, groups), *([(rows,), (), (1,), (1, 1)] if groups == 1 else [])]
        check_shape(scale, shapes, packed)
        if zero_point is not None:
            check_dtype(zero_point, ("I32", "I8"))
            check_shape(zero_point, shapes if zero_point.dtype == "I8" else [(-(-rows * bits // 32), groups)], packed)
        if order is not None:
            check_dtype(order, ("I32", "I64"))
            check_shape(order, [(columns,)], packed)
        nbytes = sum(tensor.nbytes for tensor in (packed, scale, zero_point) if tensor is not None)
        name = f"{path}.weight"
        found[name] = PackedTensor(
            name, (rows, columns), scale.dtype, f"compressed-tensors int{bits}", nbytes, context.only_finite,
            bits, group_size, scale, order, order is not None, packed, zero_point,
        )  # fmt: skip
    return found


def _scheme(settings: Mapping[str, Any], packed: RawTensor, scale: RawTensor) -> tuple[int, int, int]:
    """Return bits, group size and columns by the one of the config's schemes (config_groups) that fits the shapes."""
    groups = settings.get("config_groups")
    fitting = set()
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type", "int") != "int":
            continue
        bits, size = weights.get("num_bits"), weights.get("group_size") or -1
        if not _is_within(bits, 1, 8) or not (size == -1 or _is_within(size, 1, 1 << 20)):
            raise FormatError(
                f"config.json gives {str(bits)[:20]} bits in groups of {str(size)[:20]}; expected 1 to 8 bits, in "
                "groups of a positive size or none for whole rows."
            )
        most = packed.shape[1] * 32 // bits
        count = scale.shape[1] if len(scale.shape) == 2 else 1
        columns = min(most, count * size) if size > 0 else most
        in_groups = -(-columns // size) == count if size > 0 else count == 1
        if in_groups and -(-columns * bits // 32) == packed.shape[1]:
            fitting.add((bits, size if size > 0 else max(columns, 1), columns))
    if len(fitting) != 1:
        raise FormatError(
            f"{packed.path}: tensor {packed.name[:80]!r} of shape {list(packed.shape)} with scales of shape "
            f"{list(scale.shape)} fits {len(fitting)} of the schemes in config.json (config_groups); expected one. "
            "Fetch the model again, or get it in another format."
        )
    return fitting.pop()


def _is_within(value: object, least: int, most: int) -> TypeGuard[int]:
    return type(value) is int and least <= value <= most


def _check_columns(shape: RawTensor | None, packed: RawTensor, columns: int) -> int:
    """Return the columns that `weight_shape` gives, which may be fewer than the last word has room for."""
    if shape is None or not shape.present:
        return columns
    check_dtype(shape, ("I64", "I32"))
    check_shape(shape, [(2,)], packed)
    rows, said = (int(number) for number in shape.all())
    if rows != packed.shape[0] or not columns - 32 < said <= columns:
        raise FormatError(
            f"{shape.path}: tensor {shape.name[:80]!r} says {rows:,} x {said:,}, but the packed weight holds "
            f"{packed.shape[0]:,} x {columns:,}; the file is damaged. Fetch it again."
        )
    return said
