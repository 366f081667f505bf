"""Packed rows of documents through any of mlx-lm's models: attention that stays within each document.

A model asks its layers' caches for the mask and lets them add to its keys and values; `Rows` stands in for all of them.
Positions run on within a row, which rotary positions cannot tell from beginning anew. Where a model hands the mask to
MLX's attention as it is, the kernels' attention takes its place: it works within documents, and holds no scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any, cast

import mlx.core as mx
import numpy as np

from edger1.train.ops import extension


class Rows:
    """What packed rows are to a model's layers: a cache that keeps nothing and knows which positions see which."""

    offset = 0

    def __init__(self, documents: np.ndarray) -> None:
        """Take int32 [rows, length]: the document of its row that each token belongs to, -1 for padding."""
        starts = starts_of(documents)
        self.starts = mx.array(starts)
        self._longest = int((np.arange(starts.shape[1]) - starts).max(initial=0)) + 1
        self._masks: dict[int | None, mx.array] = {}

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Return bool [rows, 1, length, length], true where the position of the third axis sees that of the fourth."""
        window = None if window_size is None or window_size >= self._longest else window_size
        if window not in self._masks:
            at = mx.arange(length)
            seen = (at[None, None, :] <= at[None, :, None]) & (at[None, None, :] >= self.starts[:, :, None])
            if window is not None:
                seen = seen & (at[None, :, None] < at[None, None, :] + window)
            self._masks[window] = seen[:, None]
        return self._masks[window]

    def is_whole(self, mask: Any) -> bool:
        """Whether a mask is the one that documents alone limit."""
        return mask is not None and mask is self._masks.get(None)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values of the rows themselves: nothing came before."""
        return keys, values


def starts_of(documents: np.ndarray) -> np.ndarray:
    """Return int32 [rows, length]: where each position's document begins; every position of padding is one of its own.

    `documents` is int32 [rows, length], -1 for padding.
    """
    rows, length = documents.shape
    begins = np.ones((rows, length), dtype=bool)
    begins[:, 1:] = (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
    return np.maximum.accumulate(np.where(begins, np.arange(length), 0), axis=1).astype(np.int32)


@contextmanager
def attending(rows: Rows | None) -> Iterator[None]:
    """Let MLX's attention be the kernels' within, wherever its mask is that of `rows`."""
    kernels = extension()
    if rows is None or kernels is None:
        yield
        return
    original = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = _attention(kernels, rows, original)
    try:
        yield
    finally:
        mx.fast.scaled_dot_product_attention = original


def _attention(kernels: ModuleType, rows: Rows, original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def attention(
        q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **rest: Any
    ) -> mx.array:
        ours = rows.is_whole(mask) and sinks is None and all(a.dtype == mx.float32 for a in (q, k, v))
        if not ours or q.shape[2] != k.shape[2]:
            return original(q, k, v, scale=scale, mask=mask, sinks=sinks, **rest)
        return _within_documents(kernels, float(scale))(q, k, v, rows.starts)

    return attention


@cache
def _within_documents(kernels: ModuleType, scale: float) -> Callable[..., mx.array]:
    """Return attention of q [B, H, L, D], k [B, G, L, D] and v [B, G, L, V] within documents, [B, H, L, V]."""
    kind = (scale, 1.0, False, False)

    @mx.custom_function
    def flat(q: mx.array, kv: mx.array, starts: mx.array) -> mx.array:
        return kernels.document_attention(q, kv, _no_rope(q), starts, *kind)

    @flat.vjp
    def flat_vjp(primals: list[mx.array], cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
        q, kv, starts = primals
        d_q, d_kv, _ = kernels.document_attention_vjp(q, kv, _no_rope(q), starts, cotangent, *kind)
        return d_q, d_kv, mx.zeros_like(starts)

    def attention(q: mx.array, k: mx.array, v: mx.array, starts: mx.array) -> mx.array:
        batch, heads, length, _ = q.shape
        shared = k.shape[1]
        # Heads that share keys are a row of their own: the kernels split their work backwards over rows alone.
        each = q.reshape(batch * shared, heads // shared, length, -1).swapaxes(1, 2)
        kv = mx.concatenate([k, v], axis=-1).reshape(batch * shared, length, 1, -1)
        out = cast(Callable[..., mx.array], flat)(each, kv, mx.repeat(starts, shared, axis=0))
        return out.swapaxes(1, 2).reshape(batch, heads, length, -1)

    return attention


def _no_rope(q: mx.array) -> mx.array:
    return mx.zeros((*q.shape[:2], 1, 0))
