"""Calls operations in the place of layers, on mlx-lm's caches."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache as memoize
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

from edger1.kernels.blocks.plan import Plan
from edger1.kernels.prefill import FEW_ROWS, prefill
from edger1.packed_cache import PackedCache, QuantizedCache, ReadBackCache


@dataclass(frozen=True)
class _Held:
    """The operation of one module. A copy of the module has other weights and therefore none.

    It keeps names, not the module: that would be a cycle that is never collected.
    """

    call: Any
    mlp_key: str | None = None
    mlp_post_key: str | None = None
    residual_scale: float = 1.0

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def install(module: nn.Module, plan: Plan) -> None:
    """Give `module`, a layer or its attention, a class that calls the plan's operation where it applies."""
    object.__setattr__(module, "_block", _held(plan))
    kind: Any = type(module)
    module.__class__ = _with_block(kind, plan.runs == "attention half")


def restore(module: nn.Module, original: type) -> None:
    """Take back what `install` did."""
    module.__class__ = original
    vars(module).pop("_block", None)


def run(plan: Plan, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
    """Run a plan without installing it; None where the operation does not apply."""
    if plan.runs == "attention half":
        return _run_half(_held(plan), plan.anatomy.layer, x, mask, cache)
    module = plan.anatomy.attention if plan.runs == "attention" else plan.anatomy.layer
    done = _advance(plan.call, module, x, mask, cache)
    return None if done is None else done[0]


def _held(plan: Plan) -> _Held:
    if plan.runs != "attention half":
        return _Held(plan.call)
    anatomy = plan.anatomy
    return _Held(plan.call, anatomy.mlp_key, (anatomy.norms or {}).get("mlp_post"), anatomy.residual_scale)


@memoize
def _with_block(original: Any, half: bool) -> type:
    call_original = original.__call__
    # Models pass x, mask and cache in this order, or by the names that their layers give them.
    names = tuple(inspect.signature(call_original).parameters)[1:4]
    known = set(names)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        block = self._block
        if block is not None and len(args) + len(kwargs) <= 3 and kwargs.keys() <= known:
            given = args
            if len(args) < 3:
                values = dict(zip(names, args, strict=False)) | kwargs
                given = tuple(values.get(name) for name in names)
            if half:
                out = _run_half(block, self, *given)
                if out is not None:
                    return out
            else:
                done = _advance(block.call, self, *given)
                if done is not None:
                    return done[0]
        return call_original(self, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _run_half(block: _Held, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
    done = _advance(block.call, layer, x, mask, cache)
    if done is None:
        return None
    out: mx.array = layer[block.mlp_key](done[3])
    if block.mlp_post_key is not None:
        out = layer[block.mlp_post_key](out)
    return done[0] + (out if block.residual_scale == 1 else out * block.residual_scale)


def _advance(call: Any, module: Any, x: mx.array, mask: Any, cache: Any) -> Any:
    """Run the operation and take the new positions into the cache; None, and the cache as it was, if it cannot."""
    kind = type(cache)
    if kind is KVCache and x.ndim == 3 and x.shape[1] > FEW_ROWS and hasattr(call, "prefill"):
        return prefill(call, module, x, mask, cache)
    if kind is KVCache:
        done = call(module, x, mask, cache.keys, cache.values, cache.offset)
        if done is None and _make_room(cache, x):
            done = call(module, x, mask, cache.keys, cache.values, cache.offset)
        if done is not None:
            cache.keys, cache.values = done[1], done[2]
            cache.offset += x.shape[1]
        return done
    if kind in (QuantizedCache, ReadBackCache) and not cache.plain_values and cache.keys is not None:
        return _pack(call, module, x, mask, cache)
    if kind is BatchKVCache:
        end = cache._idx
        done = call(module, x, mask, cache.keys, cache.values, end, 0, None, cache.left_padding)
        if done is None and _make_room(cache, x):
            done = call(module, x, mask, cache.keys, cache.values, end, 0, None, cache.left_padding)
        if done is not None:
            cache.keys, cache.values = done[1], done[2]
            cache._idx += x.shape[1]
            cache.offset = cache.offset + x.shape[1]
        return done
    if kind is RotatingKVCache and cache.keys is not None and cache.keep == 0:
        return _turn(call, module, x, mask, cache) if x.shape[1] == 1 else _append(call, module, x, mask, cache)
    return None


def _pack(call: Any, module: Any, x: mx.array, mask: Any, cache: PackedCache) -> Any:
    """The next positions of a cache whose rows are packed."""
    bits, group = cache.format
    done = call(module, x, mask, cache.keys, cache.values, cache.offset, bits=bits, group=group)
    if done is None and x.shape[1] <= FEW_ROWS and _make_room(cache, x):
        done = call(module, x, mask, cache.keys, cache.values, cache.offset, bits=bits, group=group)
    if done is not None:
        cache.keys, cache.values = done[1], done[2]
        cache.offset += x.shape[1]
    return done


def _make_room(cache: KVCache | BatchKVCache | PackedCache, x: mx.array) -> bool:
    """Grow a cache that x does not fit into as it does itself; False if it fits or is empty."""
    length, end = x.shape[1], cache._idx if isinstance(cache, BatchKVCache) else cache.offset
    if cache.keys is None or end + length <= cache.keys.shape[2]:
        return False
    more = (cache.step + length - 1) // cache.step * cache.step
    cache.keys, cache.values = (_grown(a[..., :end, :], more) for a in (cache.keys, cache.values))
    return True


def _grown(a: mx.array, more: int) -> mx.array:
    return mx.concatenate([a, mx.zeros((*a.shape[:2], more, a.shape[3]), a.dtype)], axis=2)


def _turn(call: Any, module: Any, x: mx.array, mask: Any, cache: RotatingKVCache) -> Any:
    """One position: the oldest one's slot once the ring is full, as `RotatingKVCache` itself chooses it."""
    offset, size = cache.offset, cache.max_size
    keys, values, slot = cache.keys, cache.values, cache._idx
    if offset >= keys.shape[2] and keys.shape[2] < size:
        more = min(cache.step, size - offset)
        if more < 1:
            return None
        keys, values, slot = _grown(keys, more), _grown(values, more), offset
    elif keys.shape[2] > size:
        keys, values, slot = keys[..., -size:, :], values[..., -size:, :], size
    if slot == size:
        slot = 0
    capacity = keys.shape[2]
    if offset < capacity:
        if slot != offset:
            return None
        done = call(module, x, mask, keys, values, offset)
    elif capacity == size:
        done = call(module, x, mask, keys, values, offset, (slot + 1) % size, size)
    else:
        return None
    if done is not None:
        cache.keys, cache.values = done[1], done[2]
        cache.offset, cache._idx = offset + 1, slot + 1
    return done


def _append(call: Any, module: Any, x: mx.array, mask: Any, cache: RotatingKVCache) -> Any:
    """Several positions: behind the others in their order, each of the new ones having a whole window before it."""
    length = x.shape[1]
    keys, values = (cache._temporal_order(a) for a in (cache.keys, cache.values))
    drop = max(keys.shape[2] - cache.max_size + 1, 0)
    keys, values = (_grown(a[..., drop:, :], length) for a in (keys, values))
    count = keys.shape[2]
    done = call(module, x, mask, keys, values, cache.offset, 0, count)
    if done is not None:
        cache.keys, cache.values = done[1], done[2]
        cache.offset += length
        cache._idx = count
    return done
