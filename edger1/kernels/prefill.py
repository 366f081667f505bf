"""Prompts through the decoder layers that `blocks` runs as one operation.

More than 16 rows at once take another way through a layer than a few (`src/prefill_run.h`): all of it over parts of the
rows that stay in the processor's cache, where operations of their own would write each result to memory and read it
again. What this does not cover (another cache, mask or dtype, matrices of plain floats, a gradient) runs as it was.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

FEW_ROWS = 16
"""Up to so many rows go to the operation of a few."""


def prefill(
    operation: Any, layer: Any, x: mx.array, mask: Any, cache: KVCache
) -> tuple[mx.array, mx.array, mx.array] | None:
    """Pass x [B, L, hidden] through `layer` and append to `cache`; None where this does not apply.

    Returns the layer's result and the cache's arrays. `operation` is the layer's `DecoderLayer`. The cache grows in
    steps, as `KVCache` itself does it.
    """
    if not isinstance(mask, str) or mask != "causal" or x.shape[1] <= FEW_ROWS:
        return None
    end = cache.offset + x.shape[1]
    keys, values = cache.keys, cache.values
    if keys is not None and keys.dtype == mx.float16:
        # Decoding narrowed it, and will again without loss.
        keys, values = keys.astype(mx.float32), values.astype(mx.float32)
    if keys is None:
        capacity = -(-end // cache.step) * cache.step
    elif end > keys.shape[2]:
        more = -(-x.shape[1] // cache.step) * cache.step
        capacity = cache.offset + more
        keys, values = (_grown(a, cache.offset, more) for a in (keys, values))
    else:
        capacity = keys.shape[2]
    done: tuple[mx.array, mx.array, mx.array] | None
    done = operation.prefill(layer, x, keys, values, cache.offset, capacity)
    if done is not None:
        _, cache.keys, cache.values = done
        cache.offset = end
    return done


def _grown(a: mx.array, used: int, more: int) -> mx.array:
    room = mx.zeros((*a.shape[:2], more, a.shape[3]), a.dtype)
    return mx.concatenate([a[..., :used, :], room], axis=2)
