"""Quantizes rows of a weight as MLX lays them out, and brings plain rows into the dtype that they are kept in.

Plain rounding is MLX's own `quantize` on float32, whose scales and biases are rounded to the weight's dtype afterwards.
On the CPU that gives the arrays which mlx-lm's converter makes of a bf16 model, number by number. MLX binds arrays to
the thread whose stream made them, so each thread has a stream of its own and hands out NumPy arrays.
"""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.ggml import Array
from edger1.quant.recipes import Spec
from edger1.quant.source import Codes

PLAIN: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Containers of the floating dtypes that weights are kept in."""
INTEGERS: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"), "U8": np.dtype("<u1"), "I8": np.dtype("<i1"), "U16": np.dtype("<u2"), "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"), "I32": np.dtype("<i4"), "U64": np.dtype("<u8"), "I64": np.dtype("<i8"),
}  # fmt: skip

_PIECE = 1 << 18

_own = threading.local()


def part_shapes(shape: tuple[int, ...], spec: Spec, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of the arrays, by suffix, that a weight [..., n, k] of `dtype` is quantized into."""
    *rows, columns = shape
    if columns % spec.group_size:
        raise AssertionError(f"{columns} columns are no multiple of groups of {spec.group_size}")
    weight = ("U32", (*rows, columns * spec.bits // 32))
    groups = (*rows, columns // spec.group_size)
    if spec.mode != "affine":
        return {"weight": weight, "scales": ("U8", groups)}
    return {"weight": weight, "scales": (dtype, groups), "biases": (dtype, groups)}


def quantize(rows: np.ndarray, spec: Spec, dtype: str, importance: np.ndarray | None = None) -> Codes:
    """Quantize `rows` (float32 [..., n, k]); scales and biases come in `dtype` ("F32", "F16" or "BF16").

    `importance` holds the second moments of the inputs, from calibrating: [k, k] or [k], for a stack of experts
    [E, n, k] one for each; None is plain rounding, and so is any mode but affine. Raises FormatError where a scale does
    not fit into `dtype`.
    """
    if importance is not None and spec.mode == "affine":
        from edger1.quant import fitting_codes

        return fitting_codes.quantize(rows, spec.bits, spec.group_size, dtype, importance)
    with mx.stream(thread_stream()):
        arrays = mx.quantize(mx.array(rows), group_size=spec.group_size, bits=spec.bits, mode=spec.mode)
        if spec.mode != "affine":
            weight, scales = arrays[:2]
            mx.eval(weight, scales)
            return Codes(Array("U32", _numpy(weight)), Array("U8", _numpy(scales)), None)
        weight, scales, biases = arrays
        scales, biases = _cast(scales, dtype), _cast(biases, dtype)
        mx.eval(weight, scales, biases)
        found = Codes(Array("U32", _numpy(weight)), Array(dtype, _numpy(scales)), Array(dtype, _numpy(biases)))
    if dtype == "F16" and not (np.isfinite(found.scales.data).all() and np.isfinite(found.biases.data).all()):  # type: ignore[union-attr]
        raise FormatError("values above 65,504 do not fit into the scales' dtype F16")
    return found


def by_suffix(codes: Codes) -> dict[str, Array]:
    """Return the arrays by the suffixes that MLX gives them."""
    parts = {"weight": codes.weight, "scales": codes.scales}
    return parts if codes.biases is None else {**parts, "biases": codes.biases}


def plain(rows: np.ndarray, dtype: str) -> Array:
    """Bring rows as a source reads them into `dtype`, rounding to nearest even where it is narrower.

    Raises FormatError where a finite value does not fit.
    """
    if dtype in INTEGERS:
        return Array(dtype, np.ascontiguousarray(rows.astype(INTEGERS[dtype], copy=False)))
    if dtype == "BF16":
        with mx.stream(thread_stream()):
            cast = _cast(mx.array(np.ascontiguousarray(rows, np.float32)), dtype)
            mx.eval(cast)
            return Array(dtype, _numpy(cast))
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(rows.astype(PLAIN[dtype], copy=False))
    if dtype == "F16" and np.isinf(narrow).any() and not np.isinf(rows).any():
        raise FormatError("values above 65,504 do not fit into F16")
    return Array(dtype, narrow)


def finite(rows: np.ndarray) -> bool:
    """Tell whether there is no NaN and no infinity among `rows`."""
    flat = rows.reshape(-1)
    # In pieces that stay in the processor's cache, and not by BLAS, whose threads wait for each other.
    return all(np.isfinite(flat[at : at + _PIECE]).all() for at in range(0, len(flat), _PIECE))


def broken_groups(codes: Codes, mode: str) -> np.ndarray:
    """Return which groups stand for NaN or infinities, as booleans of the scales' shape."""
    scales = codes.scales.data
    if mode == "affine":
        assert codes.biases is not None
        return _nonfinite(codes.scales) | _nonfinite(codes.biases)
    # The one NaN of e8m0, and the two of e4m3, which NVFP4's scales and MXFP8's numbers are in.
    broken = (scales & 0x7F) == 0x7F if mode == "nvfp4" else scales == 0xFF
    if mode == "mxfp8":
        numbers = np.ascontiguousarray(codes.weight.data).view(np.uint8).reshape(*scales.shape, -1)
        broken = broken | ((numbers & 0x7F) == 0x7F).any(-1)
    return np.asarray(broken)


def without_groups(codes: Codes, broken: np.ndarray) -> Codes:
    """Return codes in which the groups marked in `broken` are zeros."""
    words = codes.weight.data.reshape(*broken.shape, -1)
    weight = np.where(broken[..., None], np.uint32(0), words).reshape(codes.weight.data.shape)

    def zeroed(array: Array) -> Array:
        return Array(array.dtype, np.where(broken, array.data.dtype.type(0), array.data))

    return Codes(Array("U32", weight), zeroed(codes.scales), None if codes.biases is None else zeroed(codes.biases))


def _nonfinite(array: Array) -> np.ndarray:
    if array.dtype == "BF16":
        return np.asarray((array.data & 0x7F80) == 0x7F80)
    return ~np.isfinite(array.data)


def _cast(array: Any, dtype: str) -> Any:
    if dtype == "BF16":
        return array.astype(mx.bfloat16).view(mx.uint16)
    return array.astype({"F16": mx.float16, "F32": mx.float32}[dtype])


def _numpy(array: Any) -> np.ndarray:
    return np.array(array, copy=False)


def thread_stream() -> Any:
    """Return this thread's own stream of MLX, for what is computed in it."""
    if not hasattr(_own, "stream"):
        _own.stream = mx.new_stream(mx.default_device())
    return _own.stream
