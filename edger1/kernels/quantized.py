"""Quantized matrix products on the CPU kernels, and on MLX's own operations where the kernels do not apply.

Both functions take MLX's arguments and compute what `mx.quantized_matmul` and `mx.gather_qmm` do, lazily and with a
gradient for `x`. The kernels cover affine quantization with 2, 3, 4, 5, 6 and 8 bits in groups of 32, 64 or 128, and
mxfp4, with x in float32, bfloat16 or float16, on CPU streams. Everything else goes to MLX.

`precision` says what becomes of x in `x @ w.T`: "exact" keeps it in float32, "fast" rounds it to int8. Up to 16 rows,
each 8 elements share one scale, max |x| / 127. In more rows each 32 do, but for the 16 channels that are largest over
all rows, which stay in float32. (On processors with matrix tiles, AMX, more than 16 rows and w go to bf16 instead.)
`x @ w`, which gradients use, is exact either way.

A row of x among up to 16 gives the same bits as that row alone, in both precisions, whatever the number of threads.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from . import _load

Precision = Literal["exact", "fast"]

_DEFAULTS = {"affine": (64, 4), "mxfp4": (32, 4)}
_AFFINE_BITS = frozenset((2, 3, 4, 5, 6, 8))
_AFFINE_GROUPS = frozenset((32, 64, 128))
_FLOATS = (mx.float32, mx.bfloat16, mx.float16)


def covers(group_size: int, bits: int, mode: str) -> bool:
    """Say whether the kernels know this quantization."""
    if mode == "mxfp4":
        return (group_size, bits) == (32, 4)
    return mode == "affine" and group_size in _AFFINE_GROUPS and bits in _AFFINE_BITS


def _kernels(x: mx.array, scales: mx.array, group_size: int, bits: int, mode: str, stream: Any) -> Any:
    """Return the extension if it applies to these arguments, else None."""
    extension = _load()[0]
    if extension is None or not covers(group_size, bits, mode):
        return None
    if x.dtype not in _FLOATS or (mode == "affine" and scales.dtype not in _FLOATS):
        return None
    device = mx.default_device() if stream is None else getattr(stream, "device", stream)
    kind = getattr(device, "type", device)
    return extension if kind == mx.DeviceType.cpu else None


def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    precision: Precision = "exact",
    *,
    bias_ratio: float = 0.0,
    stream: Any = None,
) -> mx.array:
    """Multiply x[..., K] with the transpose of a quantized w[N, K], or x[..., N] with w itself.

    `w` is uint32 [..., N, K * bits / 32], `scales` and `biases` [..., N, K / group_size] as `mx.quantize` gives them;
    batch axes broadcast against those of x. The result has the dtype of x. Where `bias_ratio` is not 0, all biases must
    be the scales times it, and need not be read. Raises ValueError where shapes or dtypes do not fit, before anything
    is computed.
    """
    default_group, default_bits = _DEFAULTS.get(mode, (0, 0))
    extension = _kernels(x, scales, group_size or default_group, bits or default_bits, mode, stream)
    if extension is None:
        return mx.quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode, stream=stream)
    return extension.qmm(
        x,
        w,
        scales,
        biases,
        transpose,
        group_size or default_group,
        bits or default_bits,
        mode,
        precision,
        bias_ratio=bias_ratio,
        stream=stream,
    )


class BiasRatio:
    """What multiplies a matrix's scales to its biases (0 if nothing does), found once for each pair of them.

    Formats without a zero point, GGUF's Q4_0 and Q8_0 among them, have biases that follow from their scales.
    """

    def __init__(self) -> None:
        self._scales: mx.array | None = None
        self._biases: mx.array | None = None
        self._ratio = 0.0

    def __deepcopy__(self, _: Any) -> BiasRatio:
        return BiasRatio()

    def of(self, w: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int) -> float:
        """Return the ratio for a matrix that stays as it is as long as its arrays are the same ones."""
        if scales is not self._scales or biases is not self._biases:
            extension = _load()[0]
            self._scales, self._biases, self._ratio = scales, biases, 0.0
            if extension is not None and biases is not None and covers(group_size, bits, "affine"):
                self._ratio = extension.bias_ratio(w, scales, biases, group_size, bits)
        return self._ratio


def gather_qmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    transpose: bool = True,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str = "affine",
    global_scale: mx.array | None = None,
    precision: Precision = "exact",
    *,
    sorted_indices: bool = False,
    stream: Any = None,
) -> mx.array:
    """Multiply the matrices x[lhs_indices[i]] of [M, K] with the quantized w[rhs_indices[i]], for every i.

    Without `lhs_indices`, the batch axes of x (all but the last two) broadcast against `rhs_indices`; without
    `rhs_indices`, the matrices of w are taken in order. Rows that meet the same matrix are computed together whatever
    their order, so `sorted_indices` only matters to MLX. The result is [*indices, M, N] in the dtype of x. Raises
    ValueError where shapes or dtypes do not fit; an index beyond w is a RuntimeError when the result is evaluated.
    """
    default_group, default_bits = _DEFAULTS.get(mode, (0, 0))
    extension = None
    if global_scale is None:
        extension = _kernels(x, scales, group_size or default_group, bits or default_bits, mode, stream)
    if extension is None:
        return mx.gather_qmm(
            x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, mode, global_scale,
            sorted_indices=sorted_indices, stream=stream,
        )  # fmt: skip
    return extension.gather_qmm(
        x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size or default_group, bits or default_bits,
        mode, precision, stream=stream,
    )  # fmt: skip
