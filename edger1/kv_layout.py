"""What the caches of a model take of memory, read off the model itself.

Every architecture caches something of its own: keys and values, a latent, a window, a state of fixed size. MLX knows
the shapes of a graph that it never computes, so a forward pass that nobody evaluates shows what would be cached, in
milliseconds, without reading a weight.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from edger1.memory import KVLayout, LayerCache

# Layers whose forward pass looks at values: module and class. They give what they are given, and cache nothing.
_LOOK_AT_VALUES = (("mlx_lm.models.dbrx", "SparseMoeBlock"),)

# Two prompts whose caches differ by one step in which mlx-lm's caches grow.
_SHORT, _LONG = 2, 258


def kv_layout(model: Any, element_bytes: int, step_tokens: int) -> KVLayout:
    """Return what mlx-lm's caches for `model` take where each of their elements has `element_bytes` bytes.

    `step_tokens` is the size of a prefill step. Runs on the thread that owns MLX.
    """
    with _without_values():
        short, long = _elements(model, _SHORT), _elements(model, _LONG)
    layers = []
    for (few, window), (many, _) in zip(short, long, strict=True):
        per_token = -(-max(0, many - few) // (_LONG - _SHORT))
        # Caches that grow in steps have the whole step from the first token on.
        fixed = max(0, few - per_token * (_LONG - _SHORT))
        layers.append(LayerCache(fixed * element_bytes, per_token * element_bytes, window))
    return KVLayout(tuple(layers), step_tokens)


@contextlib.contextmanager
def _without_values() -> Iterator[None]:
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


def _elements(model: Any, tokens: int) -> list[tuple[int, int | None]]:
    """Return for each layer's cache its elements after `tokens` tokens, and its window in tokens if it has one."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(model)
    model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
    return [
        (
            sum(array.size for _, array in tree_flatten(cache.state) if isinstance(array, mx.array)),
            cache.max_size if isinstance(cache, RotatingKVCache) else None,
        )
        for cache in caches
    ]
