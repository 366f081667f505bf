"""Multi-head latent attention on the kernels, where a model's attention caches latents (DeepSeek-V3 and its kin).

mlx-lm computes on the latents for one token at a time only; for more it makes keys and values of every head from the
whole cache. `install` looks for attention of that kind in a loaded mlx-lm model and gives it a class of its own: up to
16 rows with a plain KV cache are one operation with their projections, and any other number of rows, or kind of cache,
is attention as one operation between the layer's own projections (`src/latent.h`). The cache keeps its class and
contents: latents as keys, rotated keys as values. Attention that makes keys and values before it caches them
(DeepSeek-V2) is given a cache of latents too (`latent_expanding.py`). Where the kernels are not in place, or the
operation does not apply (an adapter), more rows than one of attention that caches latents are computed on them in MLX's
own operations (`latent_plain.py`), and one row as mlx-lm does.

Names only suggest what a part is. Whether a layer computes what the operation computes is found by running both on
random input, once for each kind of layer in a model; one that differs is left alone. The operation stands for the
weights that the layer had: one that was since given other weights, or a gradient to compute, runs as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import CacheList, KVCache

from edger1.kernels import functions
from edger1.kernels import latent_expanding as expanding
from edger1.kernels import latent_plain as plain
from edger1.kernels.latent_parts import (
    Latent,
    UnfitError,
    describe,
    input_width,
    low_rank,
    output_of,
    projected,
    scale_of,
    shape_of,
)
from edger1.packed_cache import ReadBackCache

_PARTS = ("embed_q", "unembed_out", "kv_a_proj_with_mqa", "kv_a_layernorm")
_SAME = 1e-4
"""Largest difference of the two results, relative to the largest element, that rounding explains."""
_WHOLE_ROWS = 16
_LARGE = 1 << 22
"""Bytes of cached latents."""


@dataclass
class Latents:
    """Which attention layers of a model compute on latents; `uninstall` puts everything back."""

    layers: dict[str, int] = field(default_factory=dict)
    """Class of attention -> how many of the model's run on the operation."""
    whole: int = 0
    """How many of those are one operation with their projections for few rows."""
    plain: int = 0
    """How many of those run in MLX's own operations."""
    narrowed: int = 0
    """How many would cache keys and values of every head, and cache latents instead."""
    others: dict[str, int] = field(default_factory=dict)
    """Why a layer that could does not -> how many."""
    _classes: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many layers run on the operation."""
        return sum(self.layers.values())

    def describe(self) -> str:
        """Say it in one line, for people; empty where the model has no such layers."""
        total = self.count + sum(self.others.values())
        if not total:
            return ""
        how = "in MLX's own operations" if self.plain else f"{self.whole} as one operation"
        line = f"latent attention: {self.count} of {total} layers, {how}"
        if self.narrowed:
            line += f", {self.narrowed} with latents in the cache instead of keys and values"
        return line + "".join(f"; {n}: {reason}" for reason, n in self.others.items())

    def uninstall(self) -> None:
        """Give the layers their classes back."""
        for layer, original in self._classes:
            _take_off(layer, original)
        self._classes, self.layers, self.others = [], {}, {}
        self.whole = self.plain = self.narrowed = 0

    def runs(self, layer: nn.Module) -> bool:
        """Whether an attention layer is one of them."""
        return any(layer is each for each, _ in self._classes)


def install(model: nn.Module, precision: str, extension: ModuleType | None) -> Latents:
    """Let each attention layer of `model` that caches latents, or could, run on the operation; others are left alone.

    Without an extension those that cache latents compute on them in MLX's own operations. The weights must be in place:
    a layer whose arrays are exchanged later runs without the operation.
    """
    latents = Latents()
    layers: Counter[str] = Counter()
    others: Counter[str] = Counter()
    known: dict[Any, str] = {}
    """Kinds of layers that were tried -> what differs, empty for nothing."""
    for layer in [m for m in model.modules() if _is_candidate(m, extension)]:
        try:
            latent = _describe(layer, precision, extension)
            kind = _kind(layer, latent)
            if kind not in known:
                known[kind] = _difference(layer, precision, extension)
            if known[kind]:
                raise UnfitError(known[kind])
        except (UnfitError, ValueError) as error:
            others[f"{type(layer).__name__}: {error}"] += 1
            continue
        layers[type(layer).__name__] += 1
        latents.whole += latent.around is not None
        latents.plain += latent.call is None
        latents.narrowed += expanding.is_expanding(layer)
        latents._classes.append((layer, type(layer)))
        _wear(layer, latent)
    latents.layers, latents.others = dict(layers), dict(others)
    return latents


def _is_candidate(layer: nn.Module, extension: ModuleType | None) -> bool:
    return all(part in layer for part in _PARTS) or (extension is not None and expanding.is_expanding(layer))


def _describe(layer: nn.Module, precision: str, extension: ModuleType | None) -> Latent:
    if extension is None:
        scale_of(layer)
        return Latent(None, None, shape_of(layer), None)
    shape = expanding.shape_of(layer) if expanding.is_expanding(layer) else None
    return describe(layer, precision, extension, shape)


def _wear(layer: nn.Module, latent: Latent) -> None:
    object.__setattr__(layer, "_latent", latent)
    kind: Any = type(layer)
    if expanding.is_expanding(layer):
        # Copies have no operation, but the cache's layout.
        object.__setattr__(layer, "_latent_shape", latent.shape)
        layer.__class__ = _narrowed_class(kind)
    else:
        layer.__class__ = _latent_class(kind)


def _take_off(layer: nn.Module, original: type) -> None:
    layer.__class__ = original
    vars(layer).pop("_latent", None)
    vars(layer).pop("_latent_shape", None)


@cache
def _latent_class(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        done = _run(self, x, mask, cache)
        return call_original(self, x, mask, cache) if done is None else done

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


@cache
def _narrowed_class(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        done = None
        if cache is None or expanding.takes_latents(cache):
            done = _run(self, x, mask, cache)
            if done is None and cache is not None:
                done = expanding.expanded(self, self._latent_shape, x, mask, cache)
        return call_original(self, x, mask, cache) if done is None else done

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _run(layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
    """Run a layer on its operation; None, and the cache as it was, where that does not apply."""
    latent = layer._latent
    if functions.is_causal(mask) and "indexer" not in layer:
        mask = "causal"
    if latent is None or not _usable(x, mask, cache):
        return None
    if latent.call is not None and latent.call.applies(layer, x):
        done = _whole(latent, layer, x, mask, cache)
        return _between_projections(latent, layer, x, mask, cache) if done is None else done
    if x.shape[1] == 1 or expanding.is_expanding(layer):
        return None
    return _between_projections(latent, layer, x, mask, cache, plainly=True)


def _plainly(layer: Any, latent: Latent) -> Callable[..., mx.array]:
    """Return what attends in MLX's own operations, with the arguments of the kernels' `attend`."""
    scale = scale_of(layer) * latent.shape.q_multiplier

    def attend(
        q_nope: mx.array, q_pe: mx.array, c: mx.array, k_pe: mx.array, mask: mx.array | None, causal: bool
    ) -> mx.array:
        return plain.attend(layer, latent.shape, scale, q_nope, q_pe, c, k_pe, mask, causal, latent.tile_scores)

    return attend


def _usable(x: mx.array, mask: Any, cache: Any) -> bool:
    """Whether the mask is one that all heads share, and the cache holds plain arrays."""
    caches = cache.caches if isinstance(cache, CacheList) else (cache,)
    if any(hasattr(c, "bits") for c in caches):
        return False
    if mask is None or isinstance(mask, str):
        return mask in (None, "causal")
    return mask.dtype == mx.bool_ and mask.ndim <= 4 and (mask.ndim < 3 or mask.shape[-3] == 1)


def _whole(latent: Latent, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
    """Run the layer as one operation; None where that does not apply."""
    rows = x.shape[0] * x.shape[1]
    if latent.around is None or type(cache) is not KVCache or cache.keys is None or rows > _WHOLE_ROWS:
        return None
    # Without a mask nothing is hidden, not even what comes later.
    if (mask is None and x.shape[1] > 1) or not latent.around.applies(layer, x):
        return None
    given = None if isinstance(mask, str) else mask
    done = latent.around.layer(x, cache.keys, cache.values, cache.offset, given)
    if done is None:
        return None
    out: mx.array
    out, cache.keys, cache.values = done
    cache.offset += x.shape[1]
    return out


def _between_projections(
    latent: Latent, layer: Any, x: mx.array, mask: Any, cache: Any, *, plainly: bool = False
) -> mx.array | None:
    """Run attention as one operation, or `plainly` in MLX's own, between the layer's own projections.

    Returns None where a gradient is known to flow.
    """
    shape, extension = latent.shape, latent.extension
    low = low_rank(layer, x)
    q_nope, q_pe, c, k_pe = projected(layer, shape, x, low)
    if extension is not None and (extension.is_traced(q_nope) or extension.is_traced(c)):
        return None
    indexer = layer.get("indexer")
    main = cache if indexer is None else None if cache is None else cache[0]
    offset = main.offset if main is not None else 0
    if "rope" in layer:
        q_pe, k_pe = layer.rope(q_pe, offset), layer.rope(k_pe, offset)
    codes = {}
    if not plainly and isinstance(main, ReadBackCache) and main.plain_values:
        c, k_pe = main.append(c, k_pe)
        codes = dict(zip(("bits", "group"), main.format, strict=True))
    elif main is not None:
        c, k_pe = _cached(main, c, k_pe)
    if indexer is not None:
        mask, c, k_pe = _choose_keys(indexer, x, low, mask, cache, c, k_pe)
    causal = isinstance(mask, str)
    attend = _plainly(layer, latent) if plainly else latent.call.attend
    out = attend(q_nope, q_pe, c, k_pe, None if causal else mask, causal, **codes)
    if "g_proj" in layer:
        gate = mx.sigmoid(layer.g_proj(x))
        if gate.shape[-1] == shape.heads:
            gate = mx.repeat(gate, shape.value, axis=-1)
        out = out * gate
    result: mx.array = layer[output_of(layer)](out)
    return result


def _cached(cache: Any, c: mx.array, k_pe: mx.array) -> tuple[mx.array, mx.array]:
    """Cache latents and keys, and return all that are cached.

    A large cache that outgrew its buffer is computed at once: as long as it is not, its old buffer lies beside it.
    """
    old = cache.keys
    room = None if old is None else old.shape[2]
    del old
    few = c.shape[2] <= _WHOLE_ROWS
    c, k_pe = cache.update_and_fetch(c, k_pe)
    if not few and room is not None and cache.keys.shape[2] != room and c.nbytes >= _LARGE:
        mx.eval(c, k_pe)
    return c, k_pe


def _choose_keys(
    indexer: Any, x: mx.array, low: Any, mask: Any, cache: Any, c: mx.array, k_pe: mx.array
) -> tuple[Any, mx.array, mx.array]:
    """Restrict attention to the keys that DeepSeek-V3.2's indexer chooses: as a mask, or for one row as the keys."""
    chosen = indexer(x, low, mask, cache=None if cache is None else cache[1])
    if cache is not None:
        # The indexer's cache is evaluated even where its choice is not needed.
        cache[0].keys = mx.depends(cache[0].keys, (cache[1].keys, cache[1].values))
    if chosen is None:
        return mask, c, k_pe
    if x.shape[1] == 1:
        index = chosen[:, :, 0, :, None]
        c, k_pe = (
            mx.take_along_axis(a, mx.broadcast_to(index, (*index.shape[:-1], a.shape[-1])), axis=2) for a in (c, k_pe)
        )
        return None if mask is None else mx.take_along_axis(mask, chosen, axis=-1), c, k_pe
    seen = mx.zeros((*chosen.shape[:-1], c.shape[2]), dtype=mx.bool_)
    seen = mx.put_along_axis(seen, chosen, mx.array(True), axis=-1)
    return seen if mask is None else seen & mask, c, k_pe


def _kind(layer: nn.Module, latent: Latent) -> Any:
    """What layers have in common of which one shows whether all compute what the operation computes."""
    rope = layer.get("rope")
    settings = {k: v for k, v in vars(rope).items() if isinstance(v, int | float | bool)} if rope is not None else {}
    parts = tuple((name, type(part).__name__) for name, part in sorted(layer.children().items()))
    return type(layer), latent.shape, scale_of(layer), repr(settings), parts, latent.around is None


@contextmanager
def _exactly(layer: nn.Module) -> Iterator[None]:
    """Let the quantized parts of a layer compute in f32 for a while."""
    worn = [(part, type(part)) for part in layer.modules() if type(part).__name__.startswith("KernelQuantized")]
    try:
        for part, kind in worn:
            part.__class__ = kind.__mro__[1]
        yield
    finally:
        for part, kind in worn:
            part.__class__ = kind


def _difference(layer: nn.Module, precision: str, extension: ModuleType | None) -> str:
    """Run a layer and the operation on random rows: five into an empty cache, three, one, eighteen, and for MLX's own
    operations sixty-four, which meet more than a tile.

    Returns what differs, in words; nothing where rounding explains it. All in f32, whatever the precision.
    """
    original = type(layer)
    with _exactly(layer):
        latent = _describe(layer, "exact", extension)
        lengths = (5, 3, 1, 18) if extension is not None else (5, 3, 1, 18, 64)
        width = input_width(layer)
        inputs = [mx.random.normal((1, n, width), key=mx.random.key(n)) for n in lengths]
        try:
            expected = _answers(layer, inputs)
            _wear(layer, latent if extension is not None else replace(latent, tile_scores=1))
            found = _answers(layer, inputs)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            return f"it does not run with a plain cache ({type(error).__name__})"
        finally:
            _take_off(layer, original)
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        off = abs((mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-30)).item())
        # What is no number would pass for small.
        worst = max(worst, off if off == off else float("inf"))
    return "" if worst <= _SAME else f"it computes something else than its parts suggest (off by {worst:.1g})"


def _answers(layer: nn.Module, inputs: list[mx.array]) -> list[mx.array]:
    cache: Any = CacheList(KVCache(), KVCache()) if "indexer" in layer else KVCache()
    main = cache[0] if "indexer" in layer else cache
    answers = []
    for x in inputs:
        mask = create_attention_mask(x, main, return_array=True)
        answers.append(layer(x, mask, cache))
        mx.eval(answers[-1], main.keys, main.values)
    return answers
