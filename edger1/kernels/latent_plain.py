"""Attention over cached latents in MLX's own operations, for wherever the kernels are not: on a GPU, or switched off.

mlx-lm computes on the latents for one token at a time only; for more it makes keys and values of every head from the
whole cache, and holds every head's scores of it. Here the cache passes in tiles of so many keys that the scores of a
tile have a fixed size, with a running maximum and sum (arXiv 2205.14135, algorithm 1), so that what is needed beside
the cache does not grow with it. Few rows take the matrices of keys and values to their own side (arXiv 2405.04434,
section 2.1.2: W_UK into the queries, W_UV into what is summed); from where that is more work, keys and values of a tile
are made of its latents. Sums and softmax are in float32.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from edger1.kernels.latent_parts import Shape

_FEW_ROWS = 16
_LEAST_KEYS = 64
_AT_ONCE = 4
"""Tiles up to which the whole is left to whoever evaluates the result: all that is begun has its memory at once."""


def is_absorbed(shape: Shape, length: int) -> bool:
    """Whether `length` rows have the matrices of keys and values on their side: few, or where that is less work."""
    absorbed = length * (2 * shape.rank + shape.rope)
    expanded = shape.rank * (shape.nope + shape.value) + length * (shape.nope + shape.rope + shape.value)
    return length <= _FEW_ROWS or absorbed <= expanded


def attend(
    layer: Any,
    shape: Shape,
    scale: float,
    q_nope: mx.array,
    q_pe: mx.array,
    c: mx.array,
    k_pe: mx.array,
    mask: mx.array | None,
    causal: bool,
    tile_scores: int,
) -> mx.array:
    """Return what the heads of a layer with `embed_q` and `unembed_out` attend to: [B, L, H * value].

    Queries [B, H, L, nope] and [B, H, L, rope], latents [B, 1, S, rank] and keys [B, 1, S, rope]; those with rope are
    rotated. `scale` is what scores are multiplied with, and `tile_scores` how many of them are held at once. `mask` is
    of booleans, broadcast to [B, H, L, S]; `causal` lets row i see the keys up to S - L + i. Rows that see nothing
    weigh all keys alike. The result has the dtype of `q_nope`.
    """
    dtype, keys = q_nope.dtype, c.shape[2]
    batch, heads, length, _ = q_nope.shape
    tile = max(_LEAST_KEYS, tile_scores // (batch * heads * length))
    rows = _Absorbed(layer, q_nope, q_pe, scale) if is_absorbed(shape, length) else _Made(layer, q_nope, q_pe, scale)
    state: tuple[mx.array, mx.array, mx.array] | None = None
    in_turn = keys > _AT_ONCE * tile
    for first in range(0, keys, tile):
        last = min(first + tile, keys)
        part, part_pe = c[:, :, first:last], k_pe[:, :, first:last]
        scores = rows.scores(part, part_pe)
        seen = _causal(length, keys, first, last) if causal else _columns(mask, first, last)
        if seen is not None:
            scores = mx.where(seen, scores, mx.finfo(mx.float32).min)
        if in_turn:
            # What made the scores is given back before what is made of them is asked for.
            mx.eval(scores)
        state = _added(state, scores, rows, part)
        if in_turn:
            mx.eval(state)
    assert state is not None
    _, total, summed = state
    return rows.result(summed / total).astype(dtype).transpose(0, 2, 1, 3).reshape(batch, length, -1)


def _added(
    state: tuple[mx.array, mx.array, mx.array] | None, scores: mx.array, rows: _Absorbed | _Made, latents: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Return each row's largest score, the sum of its weights, and the weighted sum of values, with a tile more."""
    largest = scores.max(axis=-1, keepdims=True)
    if state is None:
        weights = mx.exp(scores - largest)
        return largest, weights.sum(axis=-1, keepdims=True), rows.summed(weights, latents, None)
    known, total, summed = state
    largest = mx.maximum(known, largest)
    weights, shrunk = mx.exp(scores - largest), mx.exp(known - largest)
    total = total * shrunk + weights.sum(axis=-1, keepdims=True)
    return largest, total, rows.summed(weights, latents, summed * shrunk)


def _causal(length: int, keys: int, first: int, last: int) -> mx.array | None:
    if last <= keys - length + 1:
        return None
    return mx.arange(first, last) <= mx.arange(keys - length, keys)[:, None]


def _columns(mask: mx.array | None, first: int, last: int) -> mx.array | None:
    return mask if mask is None or mask.shape[-1] == 1 else mask[..., first:last]


def _wide(a: mx.array) -> mx.array:
    return a.astype(mx.float32)


class _Absorbed:
    """Rows that meet the latents themselves; all heads' rows are the rows of one product."""

    def __init__(self, layer: Any, q_nope: mx.array, q_pe: mx.array, scale: float) -> None:
        self._layer = layer
        self._shape = q_nope.shape[:3]
        q = mx.concatenate([_wide(layer.embed_q(q_nope)), _wide(q_pe)], axis=-1) * scale
        self._q = q.reshape(q.shape[0], 1, -1, q.shape[-1])

    def scores(self, latents: mx.array, k_pe: mx.array) -> mx.array:
        """Return the scores [B, H, L, T] of a tile of T keys."""
        k = mx.concatenate([_wide(latents), _wide(k_pe)], axis=-1)
        return (self._q @ k.swapaxes(-1, -2)).reshape(*self._shape, -1)

    def summed(self, weights: mx.array, latents: mx.array, more: mx.array | None) -> mx.array:
        """Return the weighted sum of latents [B, H, L, rank], with `more` of that shape added."""
        batch, _, _, tile = weights.shape
        flat = weights.reshape(batch, 1, -1, tile)
        found = flat @ _wide(latents) if more is None else mx.addmm(_as_rows(more), flat, _wide(latents))
        return found.reshape(*self._shape, -1)

    def result(self, summed: mx.array) -> mx.array:
        """Return the values [B, H, L, value] of weighted sums."""
        found: mx.array = self._layer.unembed_out(summed)
        return found


def _as_rows(a: mx.array) -> mx.array:
    return a.reshape(a.shape[0], 1, -1, a.shape[-1])


class _Made:
    """Rows that meet keys and values of each head, which are made tile by tile."""

    def __init__(self, layer: Any, q_nope: mx.array, q_pe: mx.array, scale: float) -> None:
        self._layer = layer
        self._shape = q_nope.shape[:3]
        self._q_nope, self._q_pe = _wide(q_nope) * scale, _as_rows(_wide(q_pe) * scale)

    def scores(self, latents: mx.array, k_pe: mx.array) -> mx.array:
        """Return the scores [B, H, L, T] of a tile of T keys."""
        turned = (self._q_pe @ _wide(k_pe).swapaxes(-1, -2)).reshape(*self._shape, -1)
        k = _wide(self._layer.embed_q(latents, transpose=False))
        return mx.addmm(turned, self._q_nope, k.swapaxes(-1, -2))

    def summed(self, weights: mx.array, latents: mx.array, more: mx.array | None) -> mx.array:
        """Return the weighted sum of values [B, H, L, value], with `more` of that shape added."""
        v = _wide(self._layer.unembed_out(latents))
        return weights @ v if more is None else mx.addmm(more, weights, v)

    def result(self, summed: mx.array) -> mx.array:
        """Return it as it is: these are values already."""
        return summed
