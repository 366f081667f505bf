"""Whole-number codes with zero points, which GPTQ, AWQ and compressed-tensors share: value = (code - zero) * scale.

MLX's affine format is value = scale * code + bias, so that the codes can be kept with bias = -zero * scale. That
product often does not fit in the 16 bits of the scale; scales and biases (which MLX wants in one dtype) then become
float32, where it always does, and no number changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.ggml import Array
from edger1.quant.formats.numbers import check_finite, pack
from edger1.quant.formats.tensor import StoredTensor
from edger1.quant.source import Codes, Coding

MLX_BITS = (2, 3, 4, 5, 6, 8)
MLX_GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class ZeroPointTensor(StoredTensor):
    """A matrix [n, k] in groups along k. `scale` gives the dtype of the scales.

    `order` is the group of each column where the file has that (`g_idx`); where it is not the plain order, columns of
    one group do not lie together ("act-order") and the codes cannot be kept. `said_ordered` is what the config says.
    """

    bits: int
    group_size: int
    scale: RawTensor
    order: RawTensor | None
    said_ordered: bool

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop): uint8 [n, k]."""
        raise NotImplementedError

    def read_words(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop) as MLX packs them: uint32 [n, k * bits / 32]."""
        return pack(self.read_codes(start, stop), self.bits)

    def read_scales(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scales (float32) and zero points (uint8) of rows [start, stop): [n, groups] each."""
        raise NotImplementedError

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop), dequantized."""
        out = self.read_codes(start, stop).astype(np.float32)
        scales, zeros = self.read_scales(start, stop)
        zeros = zeros.astype(np.float32)
        groups = self._groups
        if groups is None and self.shape[1] % self.group_size:
            groups = self._plain_order()
        if groups is not None:
            out -= zeros[:, groups]
            out *= scales[:, groups]
        else:
            grouped = out.reshape(*scales.shape, self.group_size)
            grouped -= zeros[..., None]
            grouped *= scales[..., None]
        return out

    # Not a plain property: it may have to read all scales and zero points.
    @cached_property
    def coding(self) -> Coding | None:
        """MLX's affine coding, where it has these bits and groups and the columns lie in order."""
        fits = self.bits in MLX_BITS and self.group_size in MLX_GROUPS and self.shape[1] % self.group_size == 0
        if not fits or (self._groups is not None if self._here else self.order is not None and self.said_ordered):
            return None
        dtype = self._exact_dtype()
        return None if dtype is None else Coding("affine", self.bits, self.group_size, dtype, dtype)

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        coding = self.coding
        assert coding is not None
        if self._groups is not None:
            raise FormatError(
                f"{self.scale.path}: tensor {self.name!r} has its columns in another order than config.json says "
                "(desc_act); correct that there and convert again."
            )
        scales, zeros = self.read_scales(start, stop)
        check_finite(self.name, scales)
        narrow = coding.scales
        return Codes(
            Array("U32", self.read_words(start, stop)),
            Array(narrow, _narrowed(scales, narrow)),
            Array(narrow, _narrowed(-scales * zeros, narrow)),
        )

    @cached_property
    def _here(self) -> bool:
        # What decides the layout of the output must not change when a file that was announced arrives.
        return self.scale.present and (self.order is None or self.order.present)

    @cached_property
    def _groups(self) -> np.ndarray | None:
        """The group of each column, None where they are in order."""
        if self.order is None:
            return None
        groups = self.order.all().astype(np.int64)
        count = -(-self.shape[1] // self.group_size)
        if groups.size and (groups.min() < 0 or groups.max() >= count):
            raise FormatError(
                f"{self.order.path}: tensor {self.order.name[:80]!r} names groups from {groups.min()} to "
                f"{groups.max()}, but there are {count}; the file is damaged. Fetch it again."
            )
        return None if np.array_equal(groups, self._plain_order()) else groups

    def _plain_order(self) -> np.ndarray:
        return np.arange(self.shape[1]) // self.group_size

    def _exact_dtype(self) -> str | None:
        """Return the dtype that holds every product of scale and zero point exactly, None where float32 does not."""
        dtype = self.scale.dtype
        if not self._here:
            return "F32" if dtype != "F32" else None
        scales, zeros = self.read_scales(0, self.shape[0])
        products = scales * zeros
        if dtype != "F32":
            return dtype if np.array_equal(_widened(_narrowed(products, dtype), dtype), products) else "F32"
        return "F32" if np.array_equal(products.astype(np.float64), scales.astype(np.float64) * zeros) else None


def _narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 `values`, which fit exactly, in safetensors' `dtype`."""
    match dtype:
        case "F16":
            with np.errstate(over="ignore"):
                return values.astype(np.float16)
        case "BF16":
            return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
        case _:
            return np.ascontiguousarray(values)


def _widened(values: np.ndarray, dtype: str) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values.astype(np.float32)
