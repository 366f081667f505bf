"""All layers of a model as one operation, where each of them runs as one already.

A token passes thirty layers of a small model in less time than MLX takes to hand it from each to the next. `install`
looks for modules that do nothing but embed tokens, pass them through such layers and normalise the result (the inner
model of most of mlx-lm's families), and gives them a class of their own: up to 16 rows with mlx-lm's `KVCache` or
`BatchKVCache` in every layer, or the quantized ones, go to one operation (`src/decoder_stack.h`), and everything else
runs as it did.

As with layers, what a module computes is found by trying, and the operation steps back wherever what it was made from
has been exchanged.
"""

from __future__ import annotations

import math
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import BatchKVCache, KVCache

from edger1.kernels import _load
from edger1.packed_cache import BatchQuantizedCache, QuantizedCache

_PACKED = (QuantizedCache, BatchQuantizedCache)
_KINDS = (KVCache, BatchKVCache, *_PACKED)
_MOST_ROWS = 16
_SAME = 1e-4
"""Largest difference of the two results, relative to the largest number in them, that rounding explains."""
_LARGEST_HALF = 65504.0
_PLACED = "_edger1_placed"
"""What a cache has in mind of the arrays that lie on huge pages: their shape."""


class _UnfitError(Exception):
    """A module is not of the shape that the operation computes."""


class _Stack:
    """The operation of one module, and what it multiplies embeddings with. A copy of the module has none."""

    def __init__(self, call: Any, scale: float, cache_dtype: mx.Dtype) -> None:
        self._call = call
        self._scale = scale
        self._cache_dtype = cache_dtype

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def release(self, caches: Any) -> None:
        """Give caches float32 back, which is what all but the operation computes in: reading them needs no widening."""
        if self._cache_dtype != mx.float32:
            _hold(caches, mx.float32, self._cache_dtype)

    def run(self, module: Any, tokens: mx.array, caches: Any) -> mx.array | None:
        """Return what `module` answers to tokens [B, L], or None where the operation does not apply."""
        x = module.embed_tokens(tokens)
        if self._scale != 1:
            x = x * self._scale
        done: mx.array | None = None
        # All layers' caches are used alike; where they are not, the operation does not apply.
        ready = _is_ready(caches[0], tokens.shape[1], self._cache_dtype)
        if ready:
            done = self._call(module, x, module.layers, caches)
        if done is None and self._call.applies(module, x, module.layers, caches):
            _make_ready(caches, tokens.shape[1], self._cache_dtype)
            done = self._call(module, x, module.layers, caches)
        return done


def install(model: nn.Module, precision: str, extension: ModuleType) -> list[tuple[nn.Module, type]]:
    """Let what `model` has of stacks of one-operation layers run as one operation each.

    In precision "fast" their caches hold float16 from the first such run on.
    Returns the modules that got another class, and which they had.
    """
    changed: list[tuple[nn.Module, type]] = []
    for module in [m for m in model.modules() if "layers" in m and "embed_tokens" in m and "norm" in m]:
        try:
            stack = _operation(module, mx.float16 if precision == "fast" else mx.float32, extension)
        except _UnfitError:
            continue
        changed.append((module, type(module)))
        object.__setattr__(module, "_stack", stack)
        kind: Any = type(module)
        module.__class__ = _stacked(kind)
    return changed


def uninstall(changed: list[tuple[nn.Module, type]]) -> None:
    """Give the modules their classes back."""
    for module, original in changed:
        module.__class__ = original
        vars(module).pop("_stack", None)


@cache
def _stacked(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, inputs: mx.array, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        stack = self._stack
        few = cache is not None and inputs.ndim == 2 and 0 < inputs.size <= _MOST_ROWS
        if stack is not None and few and all(a is None for a in (*args, *kwargs.values())):
            done = stack.run(self, inputs, cache)
            if done is not None:
                return done
        if stack is not None and cache is not None:
            stack.release(cache)
        return call_original(self, inputs, cache, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _hold(caches: Any, dtype: mx.Dtype, before: mx.Dtype) -> None:
    """Let caches of dtype `before` hold `dtype`, one after the other: no second copy of all of them is ever there."""
    for held in caches:
        if type(held) in (KVCache, BatchKVCache) and held.keys is not None and held.keys.dtype == before:
            held.keys, held.values = _as(held.keys, dtype), _as(held.values, dtype)
            mx.eval(held.keys, held.values)


def _as(a: mx.array, dtype: mx.Dtype) -> mx.array:
    """What float16 cannot hold becomes its largest, as where the operation writes: infinities would spoil all later."""
    if dtype == mx.float16:
        a = mx.clip(a, -_LARGEST_HALF, _LARGEST_HALF)
    return a.astype(dtype)


def _is_ready(held: Any, length: int, dtype: mx.Dtype) -> bool:
    """Whether a cache holds `dtype`, or packed rows, on huge pages, with room for `length` more positions."""
    if type(held) not in _KINDS or held.keys is None:
        return False
    shape = held.keys.shape
    return (
        (held.keys.dtype == dtype or type(held) in _PACKED)
        and _end(held) + length <= shape[2]
        and vars(held).get(_PLACED) == shape
    )


def _make_ready(caches: Any, length: int, dtype: mx.Dtype) -> None:
    """Make them so one after the other, growing as mlx-lm's do: no second copy of all of them is ever there."""
    extension, _ = _load()
    rooms = extension.CacheRooms() if extension else None
    for held in caches:
        if type(held) not in _KINDS or held.keys is None:
            continue
        kept = held.keys.dtype if type(held) in _PACKED else dtype
        end, capacity = _end(held), held.keys.shape[2]
        if end + length > capacity:
            capacity = end + (held.step + length - 1) // held.step * held.step
        held.keys, held.values = (_moved(a, end, capacity, kept, rooms) for a in (held.keys, held.values))
        # The shape, because a batch that sequences join or leave has other arrays then.
        vars(held)[_PLACED] = held.keys.shape


def _end(held: Any) -> int:
    end: int = held._idx if isinstance(held, BatchKVCache) else held.offset
    return end


def _moved(a: mx.array, end: int, capacity: int, dtype: mx.Dtype, rooms: Any) -> mx.array:
    mx.eval(a)
    moved: mx.array | None = rooms.hold(a, end, capacity, dtype) if rooms else None
    if moved is None:
        moved = mx.zeros((*a.shape[:2], capacity, a.shape[3]), dtype)
        moved[..., :end, :] = _as(a[..., :end, :], dtype)
        mx.eval(moved)
    return moved


def _operation(module: Any, cache_dtype: mx.Dtype, extension: ModuleType) -> _Stack:
    """Return the operation that computes what `module` does."""
    layers, norm = module["layers"], module["norm"]
    # Some families have a module there that holds the layers.
    if not isinstance(layers, list):
        raise _UnfitError
    calls = [_call_of(layer) for layer in layers]
    if not _sees_everything(module):
        raise _UnfitError
    weight, eps = norm.get("weight"), getattr(norm, "eps", None)
    if weight is None or eps is None:
        raise _UnfitError
    for factor in (weight, 1.0 + weight):
        try:
            call = extension.DecoderStack(layers, calls, factor, eps, *_KINDS)
        except ValueError as error:
            raise _UnfitError from error
        for owner, key in ((None, "layers"), (None, "embed_tokens"), (None, "norm"), (norm, "weight")):
            call.watch(owner, key, (module if owner is None else owner)[key])
        scale = _scale(module)
        if _difference(module, _Stack(call, scale, mx.float32)) <= _SAME:
            return _Stack(call, scale, cache_dtype)
    raise _UnfitError


def _call_of(layer: Any) -> Any:
    held = vars(layer).get("_block")
    if held is None:
        raise _UnfitError
    return held.call


class _Listener:
    """Stands in for a layer and keeps what is passed to it."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self.x: Any = None
        self.masks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.x = x
        self.masks = [v for v in (*args, *kwargs.values()) if isinstance(v, mx.array | str)]
        return self._layer(x, *args, **kwargs)


class _Deaf(_Listener):
    """Stands in for a layer, keeps its mask and does nothing."""

    def __call__(self, x: mx.array, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.heard = mask
        return x


def _sees_everything(module: Any) -> bool:
    """Whether a late token in plain caches sees all before it in every layer: no window is too wide to show."""
    layers = list(module["layers"])
    deaf, caches = [_Deaf(layer) for layer in layers], [KVCache() for _ in layers]
    for plain in caches:
        plain.offset = 1 << 20
    module["layers"][:] = deaf
    try:
        module(_tokens(module)[2], caches)
        return all(d.heard is None or mx.all(d.heard).item() for d in deaf)
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
        return False
    finally:
        module["layers"][:] = layers


def _tokens(module: Any) -> list[mx.array]:
    vocabulary: int = module["embed_tokens"]["weight"].shape[0]
    return [mx.arange(start, start + n)[None] * 7 % vocabulary for start, n in ((3, 5), (20, 3), (90, 1))]


def _scale(module: Any) -> float:
    """Return what the module multiplies embeddings with before its first layer.

    Raises _UnfitError also where it gives a layer another mask than the causal one: a window, say.
    """
    layers, tokens = module["layers"], _tokens(module)[0]
    listeners = [_Listener(layer) for layer in layers]
    originals, layers[:] = layers[:], listeners
    try:
        module(tokens, [KVCache() for _ in layers])
    except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise _UnfitError from error
    finally:
        layers[:] = originals
    if any(isinstance(mask, mx.array) or mask != "causal" for each in listeners for mask in each.masks):
        raise _UnfitError
    if not isinstance(listeners[0].x, mx.array):
        raise _UnfitError
    embedded, heard = module.embed_tokens(tokens), listeners[0].x
    ratio = float(((heard * embedded).sum() / mx.square(embedded).sum()).item())
    # Models state a round number, or the root of the width; the ratio is only near it.
    usual = (1.0, float(round(ratio)), round(ratio, 3), math.sqrt(embedded.shape[-1]), ratio)
    return next((scale for scale in usual if mx.array_equal(embedded * scale, heard).item()), ratio)


def _difference(module: Any, stack: _Stack) -> float:
    """Return how far the operation is from the module, relative to the largest number in its answer."""
    ours, theirs = ([KVCache() for _ in module["layers"]] for _ in range(2))
    worst = 0.0
    for i, tokens in enumerate(_tokens(module)):
        expected = module(tokens, theirs)
        # The first tokens go into empty caches, which are the layers' own matter.
        got = stack.run(module, tokens, ours) if i else module(tokens, ours)
        if got is None:
            return float("inf")
        error = mx.abs(got - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-30)
        worst = max(worst, float(error.item()) if mx.isfinite(error).item() else float("inf"))  # type: ignore[arg-type]
    return worst
