"""Takes caches back to where they were before a layer ran, so that the layer can run again.

A cache writes into its arrays by assignment (`keys[..., a:b, :] = k`), which in MLX makes a new array and puts it into
the same Python object. What is kept here are objects of their own over the same data.

mlx-lm's `KVCache`, and its quantized form, need none of it: what lies past the offset counts for nothing, so the offset
alone is kept, and running again overwrites the same rows. A second handle on the arrays would also make every token
copy them, because MLX writes in place only where nobody else holds the data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

Rewind = Callable[[], None]
"""Takes a cache back; to be called once at most."""


def is_cache(value: Any) -> bool:
    """Whether a value is one of mlx-lm's caches; not all of them have a class in common."""
    return all(hasattr(type(value), name) for name in ("state", "nbytes", "is_trimmable")) and hasattr(
        value, "__dict__"
    )


def keep(cache: Any, *, whole: bool = False) -> Rewind:
    """Remember the state of a cache; the result puts it back.

    `whole` keeps the contents even of a KVCache, for when what runs next may not write all that ran before.
    """
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    from edger1.packed_cache import PackedCache

    if (type(cache) in (KVCache, QuantizedKVCache) or isinstance(cache, PackedCache)) and not whole:
        offset = cache.offset
        return lambda: setattr(cache, "offset", offset)
    nested: list[Rewind] = []
    state = {name: _kept(value, nested, whole) for name, value in vars(cache).items()}

    def back() -> None:
        vars(cache).clear()
        vars(cache).update(state)
        for rewind in nested:
            rewind()

    return back


def _kept(value: Any, nested: list[Rewind], whole: bool) -> Any:
    import mlx.core as mx

    if isinstance(value, mx.array):
        return copy.copy(value)
    if is_cache(value):
        nested.append(keep(value, whole=whole))
        return value
    if isinstance(value, dict):
        return {key: _kept(item, nested, whole) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_kept(item, nested, whole) for item in value)
    return value
