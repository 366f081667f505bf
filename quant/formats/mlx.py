"""MLX's own quantized folders: `X.weight` (packed words), `X.scales` and, in the affine mode, `X.biases`.

After mlx.core.quantize: affine is value = scale * code + bias; mxfp4 and mxfp8 are E2M1 and E4M3 with an E8M0 scale for
32 of them; nvfp4 is E2M1 with an E4M3 scale for 16, and optionally one float32 scale for the whole (`X.global_scale`).
config.json gives bits, group size and mode, with exceptions by module. Where it is silent about a module, they follow
from the shapes as mlx-lm works them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.ggml import Array
from edger1.quant.formats.numbers import check_finite, decode_e8m0, decode_fp4, decode_fp8, unpack
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, StoredTensor, check_dtype, check_shape, take
from edger1.quant.source import Codes, Coding, Tensor

FLOATS = ("F32", "F16", "BF16")
_FIXED = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}


@dataclass(frozen=True)
class MLXTensor(StoredTensor):
    """Packed words [..., n, k * bits / 32] and their scales [..., n, k / group_size]."""

    settings: Coding
    weight: RawTensor
    scales: RawTensor
    biases: RawTensor | None
    global_scale: RawTensor | None

    @property
    def coding(self) -> Coding | None:
        """The codes as they are; a scale for the whole has no place in a coding."""
        return self.settings if self.global_scale is None else None

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop), dequantized."""
        words, scales = self.weight.rows(start, stop), self.scales.rows(start, stop)
        biases = decode(self.biases.rows(start, stop), self.biases.dtype) if self.biases is not None else None
        out = dequantize(words, decode(scales, self.scales.dtype), biases, self.settings)
        if self.global_scale is not None:
            whole = self.global_scale.all()
            # One number for the tensor, or one an expert.
            out *= whole[start:stop].reshape(-1, *[1] * (out.ndim - 1)) if whole.ndim and whole.size > 1 else whole
        return out

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        parts = [
            Array(part.dtype, part.rows(start, stop)) if part is not None else None
            for part in (self.weight, self.scales, self.biases)
        ]
        weight, scales, biases = parts
        assert weight is not None
        assert scales is not None
        if self.only_finite:
            for part in (scales, biases):
                if part is not None and part.dtype in FLOATS:
                    check_finite(self.name, decode(part.data, part.dtype))
        return Codes(weight, scales, biases)


def dequantize(words: np.ndarray, scales: np.ndarray, biases: np.ndarray | None, coding: Coding) -> np.ndarray:
    """Return the float32 numbers of `words` (uint32). `scales` and `biases` are float32, or E8M0 and E4M3 as bytes."""
    match coding.mode:
        case "affine":
            numbers = unpack(words, coding.bits).astype(np.float32)
        case "mxfp8":
            numbers, scales = decode_fp8(words.view(np.uint8), "F8_E4M3"), decode_e8m0(scales)
        case "mxfp4":
            numbers, scales = decode_fp4(words.view(np.uint8)), decode_e8m0(scales)
        case _:
            numbers, scales = decode_fp4(words.view(np.uint8)), decode_fp8(scales, "F8_E4M3")
    grouped = numbers.reshape(*scales.shape, coding.group_size)
    grouped *= scales[..., None]
    if biases is not None:
        grouped += biases[..., None]
    return grouped.reshape(numbers.shape)


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take the packed words that have scales beside them."""
    found: dict[str, Tensor] = {}
    for scales_name in [name for name in left if name.endswith(".scales")]:
        path = scales_name.removesuffix(".scales")
        name = f"{path}.weight"
        if name not in left or left[name].dtype != "U32":
            continue
        weight, scales = left[name], left[scales_name]
        coding = _coding(path, weight, scales, context.settings)
        biases = None
        if coding.mode == "affine":
            biases = take(left, f"{path}.biases", name)
            check_dtype(biases, FLOATS)
            check_shape(biases, [scales.shape], scales)
        del left[name], left[scales_name]
        whole = left.pop(f"{path}.global_scale", None)
        if whole is not None:
            check_dtype(whole, ("F32",))
            check_shape(whole, [(), (1,), weight.shape[:-2]], weight)
        settings = Coding(
            coding.mode, coding.bits, coding.group_size, scales.dtype, None if biases is None else biases.dtype
        )
        shape = (*scales.shape[:-1], scales.shape[-1] * coding.group_size)
        nbytes = sum(part.nbytes for part in (weight, scales, biases, whole) if part is not None)
        dtype = scales.dtype if coding.mode == "affine" else context.dtype
        kind = f"MLX {coding.mode} {coding.bits} bits, groups of {coding.group_size}"
        found[name] = MLXTensor(
            name, shape, dtype, kind, nbytes, context.only_finite, settings, weight, scales, biases, whole
        )
    return found


def _coding(path: str, weight: RawTensor, scales: RawTensor, settings: Any) -> Coding:
    own = settings.get(path)
    chosen = own if isinstance(own, dict) else settings
    mode = chosen.get("mode", "affine")
    bits, group_size = chosen.get("bits", 4), chosen.get("group_size", 64)
    if scales.dtype in FLOATS:
        mode = "affine"
    else:
        check_dtype(scales, ("U8",))
        if mode not in _FIXED:
            raise FormatError(
                f"{scales.path}: tensor {scales.name[:80]!r} has scales of 8 bits, but config.json gives the mode "
                f"{str(mode)[:20]!r}; expected {', '.join(_FIXED)}. Fetch the model again."
            )
        bits, group_size = _FIXED[mode]
    fitting = scales.shape[:-1] == weight.shape[:-1] and len(weight.shape) >= 2 and bits in (1, 2, 3, 4, 5, 6, 8)
    if (
        not fitting
        or group_size not in (16, 32, 64, 128)
        or scales.shape[-1] * group_size * bits != (32 * weight.shape[-1])
    ):
        raise FormatError(
            f"{weight.path}: tensor {weight.name[:80]!r} of shape {list(weight.shape)} and its scales of shape "
            f"{list(scales.shape)} do not go together at {str(bits)[:20]} bits in groups of {str(group_size)[:20]}, "
            "which config.json gives; the folder is damaged. Fetch the model again."
        )
    return Coding(mode, bits, group_size, scales.dtype, None)
