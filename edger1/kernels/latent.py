"""Multi-head latent attention on the kernels, where a model's attention caches latents (DeepSeek-V3 and its kin).

mlx-lm computes on the latents for one token at a time only; for more it makes keys and values of every head from the
whole cache. `install` looks for attention of that kind in a loaded mlx-lm model and gives it a class of its own: up to
16 rows with a plain KV cache are one operation with their projections, and any other number of rows, or kind of cache,
is attention as one operation between the layer's own projections (`src/latent.h`). The cache keeps its class and
contents: latents as keys, rotated keys as values.

Names only suggest what a part is. Whether a layer computes what the operation computes is found by running both on
random input, once for each kind of layer in a model; one that differs is left alone. The operation stands for the
weights that the layer had: one that was since given other weights, or a gradient to compute, runs as it was.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import CacheList, KVCache
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

from edger1.kernels.blocks import recognise

_PARTS = ("embed_q", "unembed_out", "kv_a_proj_with_mqa", "kv_a_layernorm")
_MULTIPLIERS = ("mla_scale_q_lora", "mla_scale_kv_lora")
_SAME = 1e-4
"""Largest difference of the two results, relative to the largest element, that rounding explains."""
_WHOLE_ROWS = 16


@dataclass
class Latents:
    """Which attention layers of a model compute on latents; `uninstall` puts everything back."""

    layers: dict[str, int] = field(default_factory=dict)
    """Class of attention -> how many of the model's run on the operation."""
    whole: int = 0
    """How many of those are one operation with their projections for few rows."""
    others: dict[str, int] = field(default_factory=dict)
    """Why a layer that caches latents does not -> how many."""
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
        line = f"latent attention: {self.count} of {total} layers, {self.whole} as one operation"
        return line + "".join(f"; {n}: {reason}" for reason, n in self.others.items())

    def uninstall(self) -> None:
        """Give the layers their classes back."""
        for layer, original in self._classes:
            layer.__class__ = original
            vars(layer).pop("_latent", None)
        self._classes, self.layers, self.others, self.whole = [], {}, {}, 0


@dataclass(frozen=True)
class _Shape:
    heads: int
    nope: int
    rope: int
    rank: int
    value: int
    q_multiplier: float
    kv_multiplier: float


@dataclass(frozen=True)
class _Latent:
    """The operation of one layer, and what the layer does around it. A copy of the layer has none."""

    call: Any
    around: Any
    """The operation that watches the projections too, if they are known: `layer` and `applies` of it."""
    shape: _Shape
    extension: ModuleType

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def install(model: nn.Module, precision: str, extension: ModuleType) -> Latents:
    """Let each attention layer of `model` that caches latents run on the operation; the others are left alone.

    The weights must be in place: a layer whose arrays are exchanged later runs as it was.
    """
    latents = Latents()
    layers: Counter[str] = Counter()
    others: Counter[str] = Counter()
    known: dict[Any, str] = {}
    """Kinds of layers that were tried -> what differs, empty for nothing."""
    for layer in [m for m in model.modules() if all(part in m for part in _PARTS)]:
        try:
            latent = _describe(layer, precision, extension)
            kind = _kind(layer, latent)
            if kind not in known:
                known[kind] = _difference(layer, precision, extension)
            if known[kind]:
                raise recognise.UnfitError(known[kind])
        except (recognise.UnfitError, ValueError) as error:
            others[f"{type(layer).__name__}: {error}"] += 1
            continue
        layers[type(layer).__name__] += 1
        latents.whole += latent.around is not None
        latents._classes.append((layer, type(layer)))
        _wear(layer, latent)
    latents.layers, latents.others = dict(layers), dict(others)
    return latents


def _wear(layer: nn.Module, latent: _Latent) -> None:
    object.__setattr__(layer, "_latent", latent)
    kind: Any = type(layer)
    layer.__class__ = _latent_class(kind)


@cache
def _latent_class(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        latent = self._latent
        if latent is None or not latent.call.applies(self, x) or not _usable(x, mask, cache):
            out: mx.array = call_original(self, x, mask, cache)
            return out
        done = _whole(latent, self, x, mask, cache)
        if done is None:
            done = _between_projections(latent, self, x, mask, cache)
        return call_original(self, x, mask, cache) if done is None else done

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _usable(x: mx.array, mask: Any, cache: Any) -> bool:
    """Whether the mask is one that all heads share, and the cache holds plain arrays."""
    caches = cache.caches if isinstance(cache, CacheList) else (cache,)
    if any(hasattr(c, "bits") for c in caches):
        return False
    if mask is None or isinstance(mask, str):
        return mask in (None, "causal")
    return mask.dtype == mx.bool_ and mask.ndim <= 4 and (mask.ndim < 3 or mask.shape[-3] == 1)


def _whole(latent: _Latent, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
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


def _between_projections(latent: _Latent, layer: Any, x: mx.array, mask: Any, cache: Any) -> mx.array | None:
    """Run attention as one operation between the layer's own projections; None where a gradient is to flow."""
    shape = latent.shape
    batch, length, _ = x.shape
    low = layer.q_a_layernorm(layer.q_a_proj(x)) if "q_a_proj" in layer else None
    q = layer.q_proj(x) if low is None else layer.q_b_proj(low)
    q = q.reshape(batch, length, shape.heads, shape.nope + shape.rope).transpose(0, 2, 1, 3)
    q_nope, q_pe = q[..., : shape.nope], q[..., shape.nope :]
    compressed = layer.kv_a_proj_with_mqa(x)
    if latent.extension.is_traced(q) or latent.extension.is_traced(compressed):
        return None
    k_pe = compressed[..., shape.rank :].reshape(batch, length, 1, shape.rope).transpose(0, 2, 1, 3)
    c = layer.kv_a_layernorm(compressed[..., : shape.rank])
    c = mx.expand_dims(c if shape.kv_multiplier == 1 else c * shape.kv_multiplier, 1)
    indexer = layer.get("indexer")
    main = cache if indexer is None else None if cache is None else cache[0]
    offset = main.offset if main is not None else 0
    if "rope" in layer:
        q_pe, k_pe = layer.rope(q_pe, offset), layer.rope(k_pe, offset)
    if main is not None:
        c, k_pe = main.update_and_fetch(c, k_pe)
    if indexer is not None:
        mask, c, k_pe = _choose_keys(indexer, x, low, mask, cache, c, k_pe)
    causal = isinstance(mask, str)
    out = latent.call.attend(q_nope, q_pe, c, k_pe, None if causal else mask, causal)
    if "g_proj" in layer:
        gate = mx.sigmoid(layer.g_proj(x))
        if gate.shape[-1] == shape.heads:
            gate = mx.repeat(gate, shape.value, axis=-1)
        out = out * gate
    result: mx.array = layer[_output(layer)](out)
    return result


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


def _output(layer: nn.Module) -> str:
    return "o_proj" if "o_proj" in layer else "dense"


def _describe(layer: nn.Module, precision: str, extension: ModuleType) -> _Latent:
    """Describe a layer to the extension. Raises UnfitError for parts it lacks, ValueError for what does not fit."""
    names = list(inspect.signature(type(layer).__call__).parameters)
    if names != ["self", "x", "mask", "cache"]:
        raise recognise.UnfitError(f"it is called with ({', '.join(names[1:])})")
    embed, unembed = layer["embed_q"], layer["unembed_out"]
    heads, rank, nope = _stack_shape(embed)
    _, value, _ = _stack_shape(unembed)
    scale = recognise._number(layer, ("scale",))
    rope = recognise._rows(layer, "kv_a_proj_with_mqa") - rank
    multipliers = [getattr(layer, name, None) or 1.0 for name in _MULTIPLIERS]
    shape = _Shape(heads, nope, rope, rank, value, *multipliers)

    def start() -> Any:
        call = extension.LatentAttention(
            heads=heads,
            nope=nope,
            rope=rope,
            rank=rank,
            value=value,
            scale=scale * shape.q_multiplier,
            precision=precision,
        )
        for name, part, key in (("embed", embed, "embed_q"), ("unembed", unembed, "unembed_out")):
            _add_stack(call, name, part)
            call.watch(None, key, part)
        return call

    call = start()
    call.finish()
    try:
        around = start()
        _add_projections(around, layer, shape)
        around.finish(whole=True)
    except (recognise.UnfitError, ValueError):
        around = None
    return _Latent(call, around, shape, extension)


def _stack_shape(part: nn.Module) -> tuple[int, int, int]:
    if not isinstance(part, MultiLinear | QuantizedMultiLinear):
        raise recognise.UnfitError(f"its matrices of keys and values are {type(part).__name__}")
    heads, rows, columns = part["weight"].shape
    return heads, rows, columns * 32 // part.bits if "scales" in part else columns


def _add_stack(call: Any, name: str, part: nn.Module) -> None:
    quantization = (part.group_size, part.bits, part.mode) if "scales" in part else ()
    call.project(name, part["weight"], part.get("scales"), part.get("biases"), None, *quantization)
    for key in ("weight", "scales", "biases"):
        if part.get(key) is not None:
            call.watch(part, key, part[key])


def _add_projections(call: Any, layer: nn.Module, shape: _Shape) -> None:
    if "indexer" in layer or "g_proj" in layer:
        raise recognise.UnfitError("it does more than attention and projections")
    names = {"kv_a": "kv_a_proj_with_mqa", "o": _output(layer)}
    names |= {"q_a": "q_a_proj", "q": "q_b_proj"} if "q_a_proj" in layer else {"q": "q_proj"}
    for name, key in names.items():
        recognise._rows(layer, key)
        recognise._Projection(name, layer, key).add(call, layer)
    norms = [("kv", "kv_a_layernorm", shape.kv_multiplier)]
    norms += [("q", "q_a_layernorm", 1.0)] if "q_a_proj" in layer else []
    for name, key, multiplier in norms:
        norm = layer[key]
        weight, bias, centered = recognise._norm(norm)
        if bias is not None or centered:
            raise recognise.UnfitError(f"its {key} is no RMS norm")
        call.norm(name, weight if multiplier == 1 else weight * multiplier, norm.eps)
        call.watch(None, key, norm)
        call.watch(norm, "weight", norm["weight"])
    if "rope" in layer:
        recognise._add_rope(call, layer["rope"])
        call.watch(None, "rope", layer["rope"])


def _kind(layer: nn.Module, latent: _Latent) -> Any:
    """What layers have in common of which one shows whether all compute what the operation computes."""
    rope = layer.get("rope")
    settings = {k: v for k, v in vars(rope).items() if isinstance(v, int | float | bool)} if rope is not None else {}
    parts = tuple((name, type(part).__name__) for name, part in sorted(layer.children().items()))
    return type(layer), latent.shape, recognise._number(layer, ("scale",)), repr(settings), parts, latent.around is None


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


def _difference(layer: nn.Module, precision: str, extension: ModuleType) -> str:
    """Run a layer and the operation on random rows: five into an empty cache, three, one, and then eighteen.

    Returns what differs, in words; nothing where rounding explains it. All in f32, whatever the precision.
    """
    original = type(layer)
    with _exactly(layer):
        latent = _describe(layer, "exact", extension)
        lengths = (5, 3, 1, 18)
        width = _input_width(layer)
        inputs = [mx.random.normal((1, n, width), key=mx.random.key(n)) for n in lengths]
        try:
            expected = _answers(layer, inputs)
            _wear(layer, latent)
            found = _answers(layer, inputs)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            return f"it does not run with a plain cache ({type(error).__name__})"
        finally:
            layer.__class__ = original
            vars(layer).pop("_latent", None)
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        error = (mx.abs(a - b).max() / mx.maximum(mx.abs(b).max(), 1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
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


def _input_width(layer: nn.Module) -> int:
    part = layer["kv_a_proj_with_mqa"]
    columns: int = part["weight"].shape[-1]
    return columns * 32 // part.bits if "scales" in part else columns
