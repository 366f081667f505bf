"""Whole decoder layers as one operation each, where a model's layers have the common shape.

A token of a small model crosses a dozen operations a layer, and passing them from thread to thread takes longer than
reading the weights. `install` looks at the layers of a loaded mlx-lm model: those that are made of the usual parts
(attention over q, k, v, o projections, a gated MLP, RMS norms, a rotary embedding) get a class of their own that gives
up to 16 rows with a plain KV cache and a causal mask to one operation (`src/decoder.h`), and everything else to the
layer as it was.

Names only suggest what a part is. Whether a layer really computes what the operation computes is found by running both
on random input; a layer that differs is left alone, and the report says so. The operation writes into the arrays of
mlx-lm's `KVCache` and keeps its interface, so that trimming, copying and saving work as ever. It stands for the
weights that the layer had: one that was since given an adapter, new weights or a gradient to compute runs as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache

_ACTIVATIONS = ("swiglu", "geglu_approx", "geglu")
_HEADS = ("n_heads", "num_attention_heads", "num_heads")
_KV_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")
_SAME = 1e-4
"""Largest difference of the two results, relative to what the layer adds to its input, that rounding explains."""
_ROUNDING = 1e-6


@dataclass
class Blocks:
    """Which layers of a model run as one operation; `uninstall` puts everything back."""

    layers: dict[str, int] = field(default_factory=dict)
    """Class of layer -> how many of the model's run as one operation."""
    others: dict[str, int] = field(default_factory=dict)
    """Why a layer does not -> how many."""
    _classes: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many layers run as one operation."""
        return sum(self.layers.values())

    def describe(self) -> str:
        """Say it in one line, for people."""
        total = self.count + sum(self.others.values())
        if not total:
            return "no decoder layers were found"
        line = f"{self.count} of {total} layers as one operation"
        return line + "".join(f"; {n}: {reason}" for reason, n in self.others.items())

    def uninstall(self) -> None:
        """Give the layers their classes back."""
        for layer, original in self._classes:
            layer.__class__ = original
            vars(layer).pop("_block", None)
        self._classes, self.layers, self.others = [], {}, {}


class _UnfitError(Exception):
    """A layer is not of the shape that the operation computes; the text says what differs."""


@dataclass(frozen=True)
class _Held:
    """The operation of one layer. A copy of the layer has other weights and therefore none."""

    call: Any

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def install(model: nn.Module, precision: str, extension: ModuleType) -> Blocks:
    """Let each decoder layer of `model` that the operation can stand for run as one; the others are left alone.

    The weights must be in place: a layer whose arrays are exchanged later runs as it was.
    """
    blocks = Blocks()
    layers: Counter[str] = Counter()
    others: Counter[str] = Counter()
    activations = list(_ACTIVATIONS)
    for layer in [m for m in model.modules() if "self_attn" in m]:
        try:
            call, activation = _operation(layer, precision, extension, activations)
        except _UnfitError as error:
            others[f"{type(layer).__name__}: {error}"] += 1
            continue
        # The next layer is probably like this one.
        activations.sort(key=lambda name: name != activation)
        layers[type(layer).__name__] += 1
        blocks._classes.append((layer, type(layer)))
        object.__setattr__(layer, "_block", _Held(call))
        kind: Any = type(layer)
        layer.__class__ = _fused(kind)
    blocks.layers, blocks.others = dict(layers), dict(others)
    return blocks


@cache
def _fused(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None, *args: Any, **kwargs: Any) -> Any:
        block = self._block
        if block is not None and type(cache) is KVCache and not args and not kwargs:
            done = block.call(self, x, mask, cache.keys, cache.values, cache.offset)
            if done is None and _make_room(cache, x):
                done = block.call(self, x, mask, cache.keys, cache.values, cache.offset)
            if done is not None:
                out, cache.keys, cache.values = done
                cache.offset += x.shape[1]
                return out
        return call_original(self, x, mask, cache, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _make_room(cache: KVCache, x: mx.array) -> bool:
    """Grow a cache that x does not fit into as `KVCache` itself does; False if it fits or is empty."""
    length, end = x.shape[1], cache.offset
    if cache.keys is None or end + length <= cache.keys.shape[2]:
        return False
    more = (cache.step + length - 1) // cache.step * cache.step

    def grown(a: mx.array) -> mx.array:
        room = mx.zeros((*a.shape[:2], more, a.shape[3]), a.dtype)
        return mx.concatenate([a[..., :end, :], room], axis=2)

    cache.keys, cache.values = grown(cache.keys), grown(cache.values)
    return True


def _operation(layer: nn.Module, precision: str, extension: ModuleType, activations: list[str]) -> tuple[Any, str]:
    """Return the operation that computes what `layer` does, and its activation."""
    probe = _Probe(layer)
    tried: list[tuple[float, str, Any]] = []
    for activation in activations:
        try:
            call = _build(layer, precision, extension, activation)
        except ValueError as error:
            raise _UnfitError(str(error)) from error
        tried.append((probe.difference(call), activation, call))
        # The two forms of GELU differ by little more than this.
        if tried[-1][0] <= _ROUNDING:
            break
    difference, activation, call = min(tried, key=lambda t: t[0])
    if difference > _SAME:
        raise _UnfitError(f"it computes something else than its parts suggest (off by {difference:.1g})")
    return call, activation


class _Probe:
    """What a layer answers to random input: five rows into an empty cache, then three more, then one."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        hidden = _weight_of(layer, "input_layernorm").shape[0]
        key = mx.random.key(0)
        self.inputs = [mx.random.normal((1, n, hidden), key=key) for n in (5, 3, 1)]
        cache = KVCache()
        try:
            self.first = layer(self.inputs[0], "causal", cache)
            mx.eval(self.first, cache.keys, cache.values)
            self.keys, self.values = mx.array(cache.keys), mx.array(cache.values)
            self.expected = [self._added(x, layer(x, "causal", cache)) for x in self.inputs[1:]]
            mx.eval(self.expected)
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise _UnfitError(f"it does not run with a plain cache ({type(error).__name__})") from error

    @staticmethod
    def _added(x: mx.array, y: mx.array) -> mx.array:
        return y - x

    def difference(self, call: Any) -> float:
        """Return how far the operation is from the layer, relative to the largest thing the layer adds."""
        keys, values, offset, worst = self.keys, self.values, 5, 0.0
        for x, expected in zip(self.inputs[1:], self.expected, strict=True):
            done = call(self.layer, x, "causal", keys, values, offset)
            if done is None:
                return float("inf")
            out, keys, values = done
            error = mx.abs(self._added(x, out) - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-30)
            # What is no number would pass for small.
            worst = max(worst, abs(error.item()) if mx.isfinite(error).item() else float("inf"))
            offset += x.shape[1]
        return worst


def _build(layer: nn.Module, precision: str, extension: ModuleType, activation: str) -> Any:
    """Describe a layer to the extension. Raises _UnfitError for parts it lacks, ValueError for what does not fit."""
    attention, mlp = layer["self_attn"], layer.get("mlp")
    if mlp is None:
        raise _UnfitError("it has no mlp")
    heads, kv_heads = _number(attention, _HEADS), _number(attention, _KV_HEADS)
    q = _part(attention, "q_proj")
    call = extension.DecoderLayer(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_rows(q) // heads,
        attention_scale=float(_number(attention, ("scale",))),
        residual_scale=float(getattr(layer, "residual_multiplier", 1.0)),
        activation=activation,
        precision=precision,
    )
    for owner, name in _projections(layer):
        _add_projection(call, name, _part(owner, f"{name}_proj"))
        call.watch(owner, f"{name}_proj", owner[f"{name}_proj"])
    for name, owner, key in _norms(layer):
        norm = _part(owner, key)
        call.norm(name, _norm_weight(norm), norm.eps)
        call.watch(None if owner is layer else owner, key, norm)
        call.watch(norm, "weight", norm["weight"])
    _add_rope(call, _part(attention, "rope"))
    for key in ("self_attn", "mlp"):
        call.watch(None, key, layer[key])
    call.watch(attention, "rope", attention["rope"])
    call.finish()
    return call


def _projections(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for name in ("q", "k", "v", "o"):
        yield layer["self_attn"], name
    for name in ("gate", "up", "down"):
        yield layer["mlp"], name


def _norms(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield the operation's name of each norm, and where it is."""
    yield "attention", layer, "input_layernorm"
    if "pre_feedforward_layernorm" in layer:
        yield "attention_post", layer, "post_attention_layernorm"
        yield "mlp", layer, "pre_feedforward_layernorm"
        if "post_feedforward_layernorm" in layer:
            yield "mlp_post", layer, "post_feedforward_layernorm"
    else:
        yield "mlp", layer, "post_attention_layernorm"
    for name in ("q", "k"):
        if f"{name}_norm" in layer["self_attn"]:
            yield name, layer["self_attn"], f"{name}_norm"


def _part(owner: nn.Module, name: str) -> Any:
    part = owner.get(name)
    if not isinstance(part, nn.Module):
        raise _UnfitError(f"it has no {name}" if part is None else f"its {name} is not one layer")
    return part


def _weight_of(layer: nn.Module, name: str) -> mx.array:
    weight: mx.array | None = _part(layer, name).get("weight")
    if weight is None or weight.ndim != 1:
        raise _UnfitError(f"its {name} has no weights")
    if weight.dtype != mx.float32:
        raise _UnfitError(f"it computes in {weight.dtype}".replace("mlx.core.", ""))
    return weight


def _number(owner: nn.Module, names: tuple[str, ...]) -> Any:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int | float):
            return value
    raise _UnfitError(f"its attention does not tell {names[0]}")


def _rows(projection: nn.Module) -> int:
    weight = projection.get("weight")
    if weight is None:
        raise _UnfitError(f"its projections are {type(projection).__name__}")
    rows: int = weight.shape[0]
    return rows


def _add_projection(call: Any, name: str, projection: nn.Module) -> None:
    # Not subclasses in general: an adapter's computes something else.
    if type(projection) is nn.Linear:
        call.project(name, projection["weight"], bias=projection.get("bias"))
    elif isinstance(projection, nn.QuantizedLinear) and type(projection).__name__ in _PLAIN_QUANTIZED:
        call.project(
            name,
            projection["weight"],
            projection["scales"],
            projection.get("biases"),
            projection.get("bias"),
            projection.group_size,
            projection.bits,
            projection.mode,
        )
    else:
        raise _UnfitError(f"its {name}_proj is a {type(projection).__name__}")
    for key in ("weight", "scales", "biases", "bias"):
        if key in projection:
            call.watch(projection, key, projection[key])


_PLAIN_QUANTIZED = ("QuantizedLinear", "KernelQuantizedLinear")


def _norm_weight(norm: nn.Module) -> mx.array:
    """Return what an RMS norm multiplies with; Gemma's keep it less one."""
    weight = norm.get("weight")
    if weight is None or not hasattr(norm, "eps"):
        raise _UnfitError(f"its norm is a {type(norm).__name__}")
    x = mx.random.normal((1, weight.shape[0]), key=mx.random.key(1))
    expected = norm(x)
    for factor in (weight, 1.0 + weight):
        got = mx.fast.rms_norm(x, factor, norm.eps)
        if mx.allclose(got, expected, rtol=1e-5, atol=1e-6).item():
            return factor
    raise _UnfitError(f"its {type(norm).__name__} is no RMS norm")


def _add_rope(call: Any, rope: Any) -> None:
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    interleaved = bool(getattr(rope, "traditional", False))
    freqs = getattr(rope, "_freqs", None)
    if dims is not None and freqs is not None:
        multiplier = float(getattr(rope, "mscale", getattr(rope, "_scale", 1.0)))
        call.rope(dims, interleaved, None, freqs, 1.0, multiplier)
    elif dims is not None and hasattr(rope, "base") and hasattr(rope, "scale"):
        call.rope(dims, interleaved, float(rope.base), None, float(rope.scale), 1.0)
    else:
        raise _UnfitError(f"its rope is a {type(rope).__name__}")
