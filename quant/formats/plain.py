"""Tensors that are stored number by number: BF16, F16, F32, F64, 8-bit floats without scales, integers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edger1.quant.formats.files import RawTensor, check_readable
from edger1.quant.formats.numbers import decode_bf16, decode_fp8
from edger1.quant.formats.tensor import Context, Raw, StoredTensor
from edger1.quant.source import Tensor


@dataclass(frozen=True)
class PlainTensor(StoredTensor):
    """A tensor whose rows are read as they lie. A scalar has one row."""

    raw: RawTensor

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop), floats widened to float32."""
        return decode(self.raw.rows(start, stop) if self.shape else self.raw.all(), self.raw.dtype)


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Return floats of safetensors' `dtype` in float32, anything else as it is."""
    match dtype:
        case "BF16":
            return decode_bf16(raw)
        case "F8_E4M3" | "F8_E5M2":
            return decode_fp8(raw, dtype)
        case "F16" | "F32" | "F64":
            return raw.astype(np.float32, copy=False)
        case _:
            return raw


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take all that is left, as it is."""
    found: dict[str, Tensor] = {}
    for name, raw in left.items():
        check_readable(raw)
        dtype = {"F8_E4M3": context.dtype, "F8_E5M2": context.dtype, "F64": "F32"}.get(raw.dtype, raw.dtype)
        kind = "F64 (rounded to F32)" if raw.dtype == "F64" else raw.dtype
        found[name] = PlainTensor(name, raw.shape, dtype, kind, raw.nbytes, context.only_finite, raw)
    left.clear()
    return found
