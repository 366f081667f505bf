"""Caches cut into stretches of tokens and joined again.

mlx-lm's caches of keys and values keep each token's apart, along one axis of their arrays, quantized or not: any
stretch of them can lie by itself. Windows, which overwrite, and states of a fixed size cannot be cut.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# What the kernels note of a cache's arrays, which a piece of it has no more.
_NOTES = ("_edger1_placed",)
_STEP = 256


@dataclass
class Part:
    """The first `count` tokens of some caches, one a layer; those of an `own` part are given up as they are used."""

    caches: list[Any]
    count: int
    own: bool


def divisible(caches: Sequence[Any], tokens: int) -> bool:
    """Whether caches of `tokens` tokens can be cut: each has `keys` and `values` of arrays [..., tokens, width].

    A class other than mlx-lm's plain and quantized ones says so with `divides_by_tokens = True`.
    """
    from mlx_lm.models.cache import KVCache, QuantizedKVCache

    def can(cache: Any) -> bool:
        kind = type(cache)
        return kind is KVCache or issubclass(kind, QuantizedKVCache) or bool(getattr(kind, "divides_by_tokens", False))

    return bool(caches) and all(can(c) and c.keys is not None and c.offset == tokens for c in caches)


def cut_off(caches: list[Any], start: int) -> list[Any]:
    """Return what caches have of the tokens from `start` on; a layer at a time, and `caches` is empty at the end."""
    return divide(caches, start, first=False)[1]


def divide(caches: list[Any], at: int, *, first: bool = True) -> tuple[list[Any], list[Any]]:
    """Cut caches in two before token `at`; a layer at a time, and `caches` is empty at the end.

    The pieces keep nothing of each other's memory. Without `first` what comes before `at` is dropped.
    """
    before: list[Any] = []
    after: list[Any] = []
    while caches:
        cache = caches.pop()
        if first:
            before.append(piece(cache, 0, at))
        after.append(piece(cache, at, cache.offset))
        del cache
    return before[::-1], after[::-1]


def shrink(caches: list[Any], room: int) -> None:
    """Free what trimming leaves behind: it keeps the whole buffers, for the sake of their beginnings.

    After it no cache has more than a step of room behind `room` tokens, nor will when it has grown to them.
    """
    for i, cache in enumerate(caches):
        inside = getattr(cache, "caches", None)
        if inside is not None:
            own = list(inside)
            shrink(own, room)
            cache.caches = type(inside)(own)
        # A layer at a time: the sum of all beginnings beside all buffers could break the budget.
        elif _lies_in_order(cache) and _is_roomy(cache, room):
            caches[i] = piece(cache, 0, cache.offset)


def _lies_in_order(cache: Any) -> bool:
    """Whether a cache's tokens lie one after the other from the first on, as in a window that has not gone round."""
    from mlx_lm.models.cache import RotatingKVCache

    if type(cache) is RotatingKVCache:
        return cache.keys is not None and cache.is_trimmable()
    return divisible([cache], getattr(cache, "offset", 0))


def _is_roomy(cache: Any, room: int) -> bool:
    capacity = (cache.keys[0] if isinstance(cache.keys, list | tuple) else cache.keys).shape[-2]
    # At the end of a step mlx-lm's caches keep what room there is, and add theirs to it.
    adds_up = cache.offset % _STEP == 0 and cache.offset < capacity < room
    return capacity > room + _STEP or adds_up


def join(parts: Sequence[Part], room: int) -> list[Any]:
    """Return caches that hold the parts one after the other, with buffers for `room` tokens in all.

    A layer at a time. Where parts have floats of several widths, the widest is taken, which loses nothing.
    """
    import mlx.core as mx
    from mlx.utils import tree_map

    count = sum(part.count for part in parts)
    spare = -(-max(room, count) // _STEP) * _STEP - count
    joined: list[Any] = []

    def together(*arrays: Any) -> Any:
        pieces = [a[..., : part.count, :] for part, a in zip(parts, arrays, strict=True)]
        shape = (*pieces[0].shape[:-2], spare, pieces[0].shape[-1])
        return mx.concatenate([*pieces, mx.zeros(shape, pieces[0].dtype)], axis=-2)

    for i in range(len(parts[0].caches)):
        layer = [part.caches[i] for part in parts]
        whole = _bare(layer[0])
        whole.keys = tree_map(together, layer[0].keys, *(c.keys for c in layer[1:]))
        whole.values = tree_map(together, layer[0].values, *(c.values for c in layer[1:]))
        whole.offset = count
        mx.eval(whole.keys, whole.values)
        joined.append(whole)
        del layer
        for part in parts:
            if part.own:
                part.caches[i] = None
    return joined


def piece(cache: Any, start: int, end: int, *, lazily: bool = False) -> Any:
    """Return a copy of a cache's tokens from `start` to `end`, without the memory of the others.

    Nothing is copied `lazily` before somebody reads it.
    """
    import mlx.core as mx
    from mlx.utils import tree_map

    own = _bare(cache)
    for name in ("keys", "values"):
        setattr(own, name, tree_map(lambda a: mx.contiguous(a[..., start:end, :]), getattr(cache, name)))
    own.offset = end - start
    if not lazily:
        mx.eval(own.keys, own.values)
    return own


def _bare(cache: Any) -> Any:
    bare = copy.copy(cache)
    for name in _NOTES:
        vars(bare).pop(name, None)
    return bare
