"""Codes, scales and biases of affine groups, fitted to what a matrix does to its inputs instead of to its numbers.

MLX's affine groups hold w ~ scale * code + bias with codes 0 .. 2^bits - 1. Plain rounding takes scale and bias from
the least and the largest weight of a group. Here the error that counts is that of the product: with the inputs' second
moments H = sum of x x^T, a row w that becomes v costs (v - w) H (v - w)^T. Three steps lower it, as far as H is known:

1. `search`: for each group, ranges that clip more or less are tried; for each, scale and bias are the weighted least
   squares of the weights on their codes, with the columns' second moments as weights. All that H's diagonal allows.
2. Error feedback (GPTQ, arXiv 2210.17323): columns are rounded one after another, and each one's error is made up for
   in the columns to come, by H's inverse. Scale and bias of a group are searched on what the group has become by then.
3. Descent: sweeps over groups, each refitting a group's scale and bias by the least squares of the whole row's error,
   then each of its codes given all others. A step is taken only where it lowers the cost.

Rows are independent of each other, so that a matrix may be fitted in windows of rows. Scales and biases are rounded to
the dtype they are kept in before codes are chosen.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import numpy as np

from edger1.quant.formats.ggml import Array
from edger1.quant.source import Codes

SHRINKS = (1.0, 0.96, 0.92, 0.88, 0.83, 0.77, 0.7)
"""Parts of a group's range that are tried; narrower ones only ever won at two and three bits."""
FEW_BITS_SHRINKS = (*SHRINKS, 0.62, 0.54, 0.46)
DAMPING = 0.01
"""Added to the diagonal of H, as a part of its mean; the value of the GPTQ paper."""
SWEEPS = 2

_TINY = np.float32(1e-20)
_MAKING = threading.Lock()


@dataclass(frozen=True)
class Fitted:
    """`codes` uint8 [n, k], `scales` and `biases` f32 [n, k / group_size], already rounded to their dtype's values."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    def values(self) -> np.ndarray:
        """Return what the codes stand for: f32 [n, k]."""
        size = self.codes.shape[1] // self.scales.shape[1]
        return np.repeat(self.scales, size, 1) * self.codes + np.repeat(self.biases, size, 1)


@dataclass(frozen=True)
class Grid:
    """Affine groups: `size` weights share a scale and a bias, kept as `dtype` ("F32", "F16" or "BF16")."""

    bits: int
    size: int
    dtype: str

    @property
    def top(self) -> np.float32:
        """The largest code."""
        return np.float32(2**self.bits - 1)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """Round f32 to the values that the scales' dtype has."""
        if self.dtype == "F32":
            return x
        if self.dtype == "F16":
            return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
        raw = np.ascontiguousarray(x, np.float32).view(np.uint32)
        return ((raw + 0x7FFF + ((raw >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


@dataclass(frozen=True)
class Curvature:
    """What a matrix of moments says of the cost, made once for many fits: `damped` H, and U of H^-1 = U^T U."""

    damped: np.ndarray
    upper: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> Curvature:
        """Make it of f32 moments [k, k], whose scale does not matter."""
        # One at a time: it takes four times what is kept, 2 GB at k = 8,192, and BLAS has threads of its own.
        with _MAKING:
            damped = np.asarray(moments, np.float64) / max(float(np.diag(moments).mean()), 1e-30)
            damped[np.diag_indices_from(damped)] += DAMPING
            upper = np.linalg.cholesky(np.linalg.inv(damped)).T
            return cls(damped.astype(np.float32), np.ascontiguousarray(upper, np.float32))


def fit(rows: np.ndarray, grid: Grid, moments: np.ndarray | Curvature | None = None, *, sweeps: int = SWEEPS) -> Fitted:
    """Fit codes to f32 rows [n, k].

    `moments` are the inputs' second moments: [k, k] or a Curvature for all three steps, [k] for the first alone; None
    weighs every column alike. Their scale does not matter.
    """
    # Columns are worked on one at a time: side by side in memory they are contiguous.
    columns = np.ascontiguousarray(rows.T, np.float32)
    if moments is None or (isinstance(moments, np.ndarray) and moments.ndim == 1):
        weights = np.ones(len(columns), np.float32) if moments is None else _floored(moments)
        state = _search_all(columns, weights, grid)
    else:
        curvature = Curvature.of(moments) if isinstance(moments, np.ndarray) else moments
        state = _feed_back(columns, curvature.upper, grid)
        for _ in range(sweeps):
            _descend(columns, curvature.damped, grid, state)
    return Fitted(
        np.ascontiguousarray(state.codes.T.astype(np.uint8)),
        np.ascontiguousarray(state.scales.T),
        np.ascontiguousarray(state.biases.T),
    )


def quantize(
    rows: np.ndarray, bits: int, group_size: int, dtype: str, moments: np.ndarray | None, *, sweeps: int = SWEEPS
) -> Codes:
    """Fit f32 rows [n, k], or a stack [E, n, k], and return them as MLX holds them; scales and biases come in `dtype`.

    `moments` are [k, k] or [k], of a stack one for each expert.
    """
    grid = Grid(bits, group_size, dtype)
    stack = rows if rows.ndim == 3 else rows[None]
    each = [None] * len(stack) if moments is None else moments if rows.ndim == 3 else [moments]
    fitted = [fit(matrix, grid, own, sweeps=sweeps) for matrix, own in zip(stack, each, strict=True)]

    def whole(parts: list[np.ndarray]) -> np.ndarray:
        return np.stack(parts) if rows.ndim == 3 else parts[0]

    return Codes(
        Array("U32", whole([pack(one.codes, bits) for one in fitted])),
        Array(dtype, whole([stored(one.scales, dtype) for one in fitted])),
        Array(dtype, whole([stored(one.biases, dtype) for one in fitted])),
    )


def stored(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return f32 values, already rounded, as the bytes of `dtype`: BF16 as uint16."""
    if dtype == "BF16":
        return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype({"F16": np.float16, "F32": np.float32}[dtype])


def cost(rows: np.ndarray, values: np.ndarray, moments: np.ndarray | None = None) -> float:
    """Return what replacing f32 rows [n, k] by `values` costs: the sum of squares of the products' errors."""
    off = values - rows
    if moments is None:
        return float(np.square(off, dtype=np.float64).sum())
    if moments.ndim == 1:
        return float((np.square(off) * moments).sum(dtype=np.float64))
    return float(((off @ moments) * off).sum(dtype=np.float64))


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes [..., k] as MLX does, little end first without gaps: uint32 [..., k * bits / 32]."""
    if bits == 8:
        return np.ascontiguousarray(codes).view(np.uint32)
    spread = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(spread.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little").view(np.uint32)


@dataclass
class _State:
    """Being fitted, columns first: codes [k, n] f32, scales and biases [k / size, n]."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


def _floored(moments: np.ndarray) -> np.ndarray:
    """Let no column count for nothing: calibration has not seen everything."""
    return np.asarray(moments + max(float(moments.mean()) * DAMPING, 1e-30), np.float32)


def _empty(columns: np.ndarray, grid: Grid) -> _State:
    groups = (len(columns) // grid.size, columns.shape[1])
    return _State(np.empty_like(columns), np.empty(groups, np.float32), np.empty(groups, np.float32))


def _search_all(columns: np.ndarray, weights: np.ndarray, grid: Grid) -> _State:
    state = _empty(columns, grid)
    for group, start in enumerate(range(0, len(columns), grid.size)):
        part = slice(start, start + grid.size)
        scale, bias = search(columns[part], weights[part], grid)
        state.scales[group], state.biases[group] = scale, bias
        state.codes[part] = np.clip(np.rint((columns[part] - bias) / scale), 0, grid.top)
    return state


def search(columns: np.ndarray, weights: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return scale and bias [n] of the group `columns` [size, n] with the least error weighted by `weights` [size]."""
    low, high = columns.min(0), columns.max(0)
    share = (weights / weights.sum())[:, None].astype(np.float32)
    mean = (share * columns).sum(0)
    centred = columns - mean
    best = np.full(low.shape, np.inf, np.float32)
    scales, biases = np.ones_like(low), low.copy()
    for shrink in SHRINKS if grid.bits > 3 else FEW_BITS_SHRINKS:
        scale = np.maximum((high - low) * np.float32(shrink / grid.top), _TINY)
        bias = (high + low - scale * grid.top) / 2
        codes = np.clip(np.rint((columns - bias) / scale), 0, grid.top)
        middle = (share * codes).sum(0)
        off = codes - middle
        weighted = share * off
        spread = (weighted * off).sum(0)
        slope = (weighted * centred).sum(0) / np.maximum(spread, _TINY)
        usable = slope > _TINY
        scale = np.maximum(grid.rounded(np.where(usable, slope, scale)), _smallest(grid))
        bias = grid.rounded(np.where(usable, mean - scale * middle, bias))
        codes = np.clip(np.rint((columns - bias) / scale), 0, grid.top)
        codes *= scale
        codes += bias
        codes -= columns
        error = (share * np.square(codes, out=codes)).sum(0)
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(scales, scale, where=better)
        np.copyto(biases, bias, where=better)
    return scales, biases


def _smallest(grid: Grid) -> np.float32:
    return np.float32(2.0**-24 if grid.dtype == "F16" else 1e-30)


def _feed_back(columns: np.ndarray, upper: np.ndarray, grid: Grid) -> _State:
    """Round columns in order, each one's error made up for in those to come."""
    state, left = _empty(columns, grid), columns.copy()
    weights = np.diag(upper) ** -2
    for group, start in enumerate(range(0, len(columns), grid.size)):
        stop = start + grid.size
        inside = left[start:stop]
        scale, bias = search(inside, weights[start:stop], grid)
        state.scales[group], state.biases[group] = scale, bias
        errors = np.empty_like(inside)
        for j in range(grid.size):
            row = start + j
            codes = np.clip(np.rint((inside[j] - bias) / scale), 0, grid.top)
            state.codes[row] = codes
            errors[j] = (inside[j] - (scale * codes + bias)) / upper[row, row]
            inside[j + 1 :] -= upper[row, row + 1 : stop, None] * errors[j]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return state


def _descend(columns: np.ndarray, h: np.ndarray, grid: Grid, state: _State) -> None:
    """Take one sweep of descent over groups: scale and bias, then code after code."""
    values = np.repeat(state.scales, grid.size, 0) * state.codes + np.repeat(state.biases, grid.size, 0)
    gradient = h @ (values - columns)
    for group, start in enumerate(range(0, len(columns), grid.size)):
        part = slice(start, start + grid.size)
        own = h[part, part]
        moved = _refit(own, gradient[part], group, part, grid, state)
        inside = gradient[part] + own @ moved
        scale = state.scales[group]
        for j in range(grid.size):
            row = start + j
            codes = np.clip(np.rint(state.codes[row] - inside[j] / (own[j, j] * scale)), 0, grid.top)
            step = scale * (codes - state.codes[row])
            state.codes[row] = codes
            moved[j] += step
            inside += own[:, j, None] * step
        gradient += h[:, part] @ moved


def _refit(own: np.ndarray, gradient: np.ndarray, group: int, part: slice, grid: Grid, state: _State) -> np.ndarray:
    """Refit a group's scale and bias for the whole row's error; return by how much its values moved, [size, n]."""
    codes, scale, bias = state.codes[part], state.scales[group], state.biases[group]
    # The normal equations of two unknowns, for each row.
    a, b, c = ((own @ codes) * codes).sum(0), own.sum(0) @ codes, own.sum()
    p, q = -(gradient * codes).sum(0), -gradient.sum(0)
    determinant = a * c - b * b
    solvable = determinant > 1e-6 * a * c
    slope = np.where(solvable, (p * c - q * b) / np.where(solvable, determinant, 1), 0)
    wanted = grid.rounded(scale + slope)
    wanted = np.where(wanted > _smallest(grid), wanted, scale)
    shifted = grid.rounded(bias + np.where(solvable, (q - b * (wanted - scale)) / c, 0))
    moved = (wanted - scale) * codes + (shifted - bias)
    change = 2 * (moved * gradient).sum(0) + ((own @ moved) * moved).sum(0)
    better = change < 0
    moved *= better
    state.scales[group] = np.where(better, wanted, scale)
    state.biases[group] = np.where(better, shifted, bias)
    return moved
