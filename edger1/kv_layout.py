"""What the caches of a model take of memory, read off the model itself.

Every architecture caches something of its own: keys and values, a latent, a window, a state of fixed size. MLX knows
the shapes of a graph that it never computes, so a forward pass that nobody evaluates shows what would be cached, in
milliseconds, without reading a weight.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from edger1.memory import KVLayout, LayerCache

if TYPE_CHECKING:
    from edger1.quantized_kv import Quantization

# Layers whose forward pass looks at values: module and class. They give what they are given, and cache nothing.
_LOOK_AT_VALUES = (("mlx_lm.models.dbrx", "SparseMoeBlock"),)

# Two prompts whose caches differ by one step in which mlx-lm's caches grow.
_SHORT, _LONG = 2, 258


def kv_layout(model: Any, element_bytes: int, step_tokens: int, quantization: Quantization | None = None) -> KVLayout:
    """Return what the caches for `model` take where each element that is not quantized has `element_bytes` bytes.

    `step_tokens` is the size of a prefill step. Runs on the thread that owns MLX.
    """
    with without_values():
        short, long = (_taken(model, tokens, element_bytes, quantization) for tokens in (_SHORT, _LONG))
    layers = []
    for (few, window, _), (many, _, _) in zip(short, long, strict=True):
        per_token = -(-max(0, many - few) // (_LONG - _SHORT))
        # Caches that grow in steps have the whole step from the first token on.
        fixed = max(0, few - per_token * (_LONG - _SHORT))
        layers.append(LayerCache(fixed, per_token, window))
    return KVLayout(tuple(layers), step_tokens, max(read_back for _, _, read_back in short) * element_bytes)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Let layers that would read weights on the way hand their input on: what is cached does not depend on it."""
    blind = [getattr(sys.modules[module], name) for module, name in _LOOK_AT_VALUES if module in sys.modules]
    originals = [layer.__call__ for layer in blind]
    for layer in blind:
        layer.__call__ = lambda _, x: x
    try:
        yield
    finally:
        for layer, original in zip(blind, originals, strict=True):
            layer.__call__ = original


def _taken(
    model: Any, tokens: int, element_bytes: int, quantization: Quantization | None
) -> list[tuple[int, int | None, int]]:
    """Return for each layer's cache its bytes after `tokens` tokens, its window in tokens if it has one, and how many
    numbers a token of it is read back to."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import RotatingKVCache

    from edger1.packed_cache import PackedCache
    from edger1.quantized_kv import new_caches, read_back_elements

    caches = new_caches(model, quantization)
    model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)

    def nbytes(cache: Any) -> int:
        if isinstance(cache, PackedCache):
            return cache.nbytes
        arrays = [array for _, array in tree_flatten(cache.state) if isinstance(array, mx.array)]
        return element_bytes * sum(array.size for array in arrays)

    return [
        (nbytes(cache), cache.max_size if isinstance(cache, RotatingKVCache) else None, read_back_elements(cache))
        for cache in caches
    ]
