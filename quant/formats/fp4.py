"""4-bit floats (E2M1) in NVFP4 and MXFP4, two to a byte, under the names of compressed-tensors and of ModelOpt.

NVFP4 has an E4M3 scale for every 16 of a row, and one float32 for the tensor: compressed-tensors divides by it
(`weight_global_scale`), ModelOpt multiplies (`weight_scale_2`). The bytes are `weight_packed` U8 [n, k / 2] in
the former, `weight` in the latter, the scales `weight_scale` in both. MXFP4 has an E8M0 scale for every 32, as U8.

gpt-oss's own `_blocks` and `_scales` are not taken here: mlx-lm's model knows them by these names.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.ggml import Array
from edger1.quant.formats.numbers import decode_e8m0, decode_fp4, decode_fp8
from edger1.quant.formats.tensor import Context, Raw, StoredTensor, check_dtype, check_shape, take
from edger1.quant.source import Codes, Coding, Tensor


@dataclass(frozen=True)
class FP4Tensor(StoredTensor):
    """See the module; `whole` is the scale of the tensor, `divides` says how it is meant."""

    group_size: int
    packed: RawTensor
    scale: RawTensor
    whole: RawTensor | None
    divides: bool

    @property
    def coding(self) -> Coding | None:
        """MLX's mxfp4; its nvfp4 has no place for the scale of the tensor in a model's layers."""
        return Coding("mxfp4", 4, 32, "U8", None) if self.whole is None and self.group_size == 32 else None

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop), dequantized."""
        out = decode_fp4(self.packed.rows(start, stop))
        raw = self.scale.rows(start, stop)
        scales = decode_e8m0(raw) if self.group_size == 32 else decode_fp8(raw, "F8_E4M3")
        if self.whole is not None:
            whole = self.whole.all().reshape(-1)[0]
            scales = scales / whole if self.divides else scales * whole
        grouped = out.reshape(*scales.shape, self.group_size)
        grouped *= scales[..., None]
        return out

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        scales = self.scale.rows(start, stop)
        if self.only_finite and (scales == 255).any():
            raise FormatError(f"{self.packed.path}: tensor {self.name!r} has scales that are NaN; fetch it again.")
        return Codes(Array("U32", self.packed.rows(start, stop).view("<u4")), Array("U8", scales), None)


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take packed 4-bit floats with their scales."""
    found: dict[str, Tensor] = {}
    for part in list(left):
        path, _, suffix = part.rpartition(".")
        if suffix not in ("weight_packed", "weight") or left[part].dtype not in ("U8", "F4"):
            continue
        if suffix == "weight" and f"{path}.weight_scale" not in left:
            continue
        scale = take(left, f"{path}.weight_scale", part)
        packed = left.pop(part)
        if packed.dtype == "F4":
            raise FormatError(f"{packed.path}: tensor {part[:80]!r} has the dtype F4, which cannot be read yet.")
        divisor, factor = left.pop(f"{path}.weight_global_scale", None), left.pop(f"{path}.weight_scale_2", None)
        whole = divisor or factor
        check_dtype(scale, ("F8_E4M3", "U8", "F8_E8M0"))
        if len(packed.shape) < 2:
            raise FormatError(f"{packed.path}: tensor {part[:80]!r} has {len(packed.shape)} dimensions instead of 2.")
        group_size = 16 if scale.dtype == "F8_E4M3" else 32
        *lead, half = packed.shape
        if half * 2 % group_size:
            raise FormatError(f"{packed.path}: the rows of tensor {part[:80]!r} are no whole groups of {group_size}.")
        check_shape(scale, [(*lead, half * 2 // group_size)], packed)
        if whole is not None:
            check_dtype(whole, ("F32",))
            check_shape(whole, [(), (1,)], packed)
        kind = "NVFP4" if group_size == 16 else "MXFP4"
        nbytes = packed.nbytes + scale.nbytes
        name = f"{path}.weight"
        found[name] = FP4Tensor(
            name, (*lead, half * 2), context.dtype, kind, nbytes, context.only_finite,
            group_size, packed, scale, whole, divisor is not None,
        )  # fmt: skip
    return found
