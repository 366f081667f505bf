"""The parts of a decoder layer, by the names that mlx-lm's models give them.

What is found here is a guess that `probe.py` holds against the layer itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ACTIVATIONS = ("swiglu", "geglu_approx", "geglu")

_ATTENTION = ("self_attn", "attention", "attn")
_HEADS = ("n_heads", "num_attention_heads", "num_heads", "n_head")
_KV_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")
_SCALE = ("scale", "sm_scale", "softmax_scale")
_SINKS = ("sinks", "attention_sink_bias")
_ROPE = ("rope", "rotary_emb")
_FUSED_QKV = ("qkv_proj", "query_key_value", "q_k_v_proj", "wqkv")
_OUT = ("o_proj", "out_proj", "dense", "wo")
_QK_NORMS = (("q_norm", "k_norm"), ("query_layernorm", "key_layernorm"), ("q_layernorm", "k_layernorm"))
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_PLAIN_QUANTIZED = ("QuantizedLinear", "KernelQuantizedLinear")

_ROLES = ("attention", "attention_post", "mlp", "mlp_post")
_NORMS: tuple[tuple[str | None, ...], ...] = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", None, "pre_ff_layernorm", None),
    ("attention_layernorm", None, "feedforward_layernorm", None),
    ("attention_norm", None, "ffn_norm", None),
    ("operator_norm", None, "ffn_norm", None),
    ("attn_norm", None, "ffn_norm", None),
    ("ln_1", None, "ln_2", None),
    # One norm for both halves, which then stand side by side.
    ("input_layernorm", None, None, None),
    ("norm", None, None, None),
    ("ln_1", None, None, None),
)
"""Names of the norms before attention, after it, before the MLP and after it; a layer has exactly those of one line."""


class UnfitError(Exception):
    """A layer is not of the shape that the operation computes; the text says what differs."""


@dataclass(frozen=True)
class Form:
    """What the parts of a layer leave open."""

    activation: str = "swiglu"
    rotates: bool = True
    norms_after_rope: bool = False


@dataclass(frozen=True)
class Anatomy:
    """A layer's parts."""

    layer: nn.Module
    attention_key: str
    mlp_key: str | None
    """None where what follows attention is not one module."""
    norms: dict[str, str] | None
    """Role -> name; None where the layer's norms are none of the known ones."""
    residual_scale: float
    known_norms: dict[int, tuple[mx.array, mx.array | None, bool]] = field(default_factory=dict)
    """Norms that were looked at, by their id: a layer is described more than once."""

    @property
    def attention(self) -> nn.Module:
        """The attention module."""
        module: nn.Module = self.layer[self.attention_key]
        return module

    @property
    def parallel(self) -> bool:
        """Whether the MLP takes what attention takes."""
        return self.norms is not None and set(self.norms) == {"attention"}

    def whole(self) -> str:
        """Return "" if the layer may be one operation, else why it is not."""
        reason = self.half()
        if reason or self.mlp_key is None:
            return reason
        try:
            _mlp(self.layer[self.mlp_key])
        except UnfitError as error:
            return f"its {self.mlp_key} ({type(self.layer[self.mlp_key]).__name__}) {error}"
        return ""

    def half(self) -> str:
        """Return "" if the layer up to the MLP may be one operation, else why it is not."""
        if self.norms is None:
            return "its norms are not arranged in a known way"
        return "" if self.mlp_key is not None else "its other half is not one module"


def examine(layer: nn.Module) -> Anatomy:
    """Find a layer's parts. Raises UnfitError where it has no attention."""
    key = next((k for k in _ATTENTION if isinstance(layer.get(k), nn.Module)), None)
    if key is None:
        raise UnfitError("it has no attention")
    children = {k: v for k, v in layer.items() if isinstance(v, nn.Module) and k != key}
    norms = {k for k, v in children.items() if _looks_like_norm(v)}
    others = [k for k in children if k not in norms]
    plain = not any(isinstance(v, mx.array | list | dict) and k not in children for k, v in layer.items() if k != key)
    named = next((line for line in _NORMS if {n for n in line if n} == norms), None)
    return Anatomy(
        layer,
        key,
        others[0] if len(others) == 1 and plain else None,
        {role: name for role, name in zip(_ROLES, named, strict=True) if name} if named else None,
        _residual_scale(layer),
    )


def _residual_scale(layer: nn.Module) -> float:
    depth, count = getattr(layer, "scale_depth", None), getattr(layer, "num_hidden_layers", None)
    if isinstance(depth, int | float) and isinstance(count, int):
        return depth / math.sqrt(count)
    return float(getattr(layer, "residual_multiplier", 1.0))


def _looks_like_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def forms(anatomy: Anatomy) -> list[Form]:
    """Return the forms that attention may have, the usual one first."""
    attention = anatomy.attention
    rotations = [True, False] if _rope(attention) is not None else [False]
    after = [False, True] if _qk_norms(attention) else [False]
    return [Form(rotates=r, norms_after_rope=a) for r in rotations for a in after if r or not a]


def build(anatomy: Anatomy, form: Form, runs: str, precision: str, extension: ModuleType) -> Any:
    """Describe a layer, or what of it `runs` names, to the extension.

    Raises UnfitError for parts it lacks, ValueError for what does not fit.
    """
    attention, layer = anatomy.attention, anatomy.layer
    alone = runs == "attention"
    heads = int(_number(attention, _HEADS))
    projections, head_dim, kv_heads = _attention_projections(attention, heads)
    scale = _number(attention, _SCALE, head_dim**-0.5)
    call = extension.DecoderLayer(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        attention_scale=float(scale),
        residual_scale=1.0 if alone else anatomy.residual_scale,
        soft_cap=float(getattr(attention, "attn_logit_softcapping", None) or 0.0),
        activation=form.activation,
        precision=precision,
        parallel=not alone and anatomy.parallel,
        residual=not alone,
        norms_after_rope=form.norms_after_rope,
    )
    if runs == "layer" and anatomy.mlp_key is not None:
        projections += _mlp(layer[anatomy.mlp_key])
        call.watch(None, anatomy.mlp_key, layer[anatomy.mlp_key])
    # The operation does not hold the module that holds it: nobody would collect the two.
    called = attention if alone else layer
    for projection in projections:
        projection.add(call, called)
    for name, key in _qk_norms(attention):
        _add_norm(call, name, attention, key, called, anatomy.known_norms)
    if not alone:
        for role, key in (anatomy.norms or {}).items():
            if role != "mlp_post" or runs == "layer":
                _add_norm(call, role, layer, key, called, anatomy.known_norms)
        call.watch(None, anatomy.attention_key, attention)
    sinks = next((attention[k] for k in _SINKS if isinstance(attention.get(k), mx.array)), None)
    if sinks is not None:
        call.sinks(sinks)
        for key in _SINKS:
            if key in attention:
                _watch(call, attention, key, called)
    rope = _rope(attention)
    if form.rotates and rope is not None:
        _add_rope(call, attention[rope])
        _watch(call, attention, rope, called)
    call.finish()
    return call


@dataclass(frozen=True)
class _Projection:
    """Rows [begin, end) of a linear layer, as one of the operation's projections."""

    name: str
    owner: nn.Module
    key: str
    begin: int | None = None
    end: int | None = None

    def add(self, call: Any, called: nn.Module) -> None:
        layer = self.owner[self.key]
        rows = slice(self.begin, self.end)

        def part(name: str) -> mx.array | None:
            value: mx.array | None = layer.get(name)
            return value if value is None or self.begin is None else value[rows]

        # Not subclasses in general: an adapter's computes something else.
        if type(layer) is nn.Linear:
            call.project(self.name, part("weight"), bias=part("bias"))
        elif isinstance(layer, nn.QuantizedLinear) and type(layer).__name__ in _PLAIN_QUANTIZED:
            call.project(
                self.name,
                part("weight"),
                part("scales"),
                part("biases"),
                part("bias"),
                layer.group_size,
                layer.bits,
                layer.mode,
            )
        else:
            raise UnfitError(f"its {self.key} is a {type(layer).__name__}")
        _watch(call, self.owner, self.key, called)
        for key in ("weight", "scales", "biases", "bias"):
            if key in layer:
                call.watch(layer, key, layer[key])


def _watch(call: Any, owner: nn.Module, key: str, called: nn.Module) -> None:
    call.watch(None if owner is called else owner, key, owner[key])


def _attention_projections(attention: nn.Module, heads: int) -> tuple[list[_Projection], int, int]:
    """Return the projections of attention, its head dimension and its key heads."""
    out = next((key for key in _OUT if key in attention), None)
    if out is None:
        raise UnfitError("its attention has no output projection")
    projections = [_Projection("o", attention, out)]
    fused = next((key for key in _FUSED_QKV if key in attention), None)
    if fused is not None:
        kv_heads = int(_number(attention, _KV_HEADS, heads))
        dim, left = divmod(_rows(attention, fused), heads + 2 * kv_heads)
        if left:
            raise UnfitError(f"its {fused} does not split into {heads} and twice {kv_heads} heads")
        bounds = [0, heads * dim, (heads + kv_heads) * dim, (heads + 2 * kv_heads) * dim]
        projections += [
            _Projection(name, attention, fused, bounds[i], bounds[i + 1]) for i, name in enumerate(("q", "k", "v"))
        ]
        return projections, dim, kv_heads
    dim = _rows(attention, "q_proj") // heads
    kv_heads = int(_number(attention, _KV_HEADS, _rows(attention, "k_proj") // max(dim, 1)))
    return projections + [_Projection(name, attention, f"{name}_proj") for name in ("q", "k", "v")], dim, kv_heads


def _mlp(mlp: nn.Module) -> list[_Projection]:
    children = {key for key, value in mlp.items() if isinstance(value, nn.Module)}
    for gate, up, down in _MLPS:
        if children == {gate, up, down}:
            named = {"gate": gate, "up": up, "down": down}
            for key in named.values():
                _rows(mlp, key)
            return [_Projection(name, mlp, key) for name, key in named.items()]
    if children == {"gate_up_proj", "down_proj"}:
        half, odd = divmod(_rows(mlp, "gate_up_proj"), 2)
        if not odd:
            return [
                _Projection("gate", mlp, "gate_up_proj", 0, half),
                _Projection("up", mlp, "gate_up_proj", half, 2 * half),
                _Projection("down", mlp, "down_proj"),
            ]
    raise UnfitError("is no plain gated MLP")


def _rows(owner: nn.Module, key: str) -> int:
    projection = owner.get(key)
    if not isinstance(projection, nn.Module):
        raise UnfitError(f"it has no {key}")
    weight = projection.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim != 2:
        raise UnfitError(f"its {key} is a {type(projection).__name__}")
    return int(weight.shape[0])


def _number(owner: nn.Module, names: Sequence[str], default: float | None = None) -> float:
    for name in names:
        value = getattr(owner, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    if default is None:
        raise UnfitError(f"its attention does not tell {names[0]}")
    return default


def _qk_norms(attention: nn.Module) -> list[tuple[str, str]]:
    """Return the operation's name and the attention's of the norms of queries and keys."""
    for names in _QK_NORMS:
        if any(isinstance(attention.get(key), nn.Module) for key in names):
            return [(name, key) for name, key in zip(("q", "k"), names, strict=True) if key in attention]
    return []


def _add_norm(call: Any, name: str, owner: nn.Module, key: str, called: nn.Module, known: dict[int, Any]) -> None:
    norm = owner[key]
    if id(norm) not in known:
        known[id(norm)] = _norm(norm)
    weight, bias, centered = known[id(norm)]
    call.norm(name, weight, _epsilon(norm), centered, bias)
    _watch(call, owner, key, called)
    for part in ("weight", "bias"):
        if part in norm:
            call.watch(norm, part, norm[part])


def _epsilon(norm: nn.Module) -> float:
    for name in ("eps", "variance_epsilon"):
        value = getattr(norm, name, None)
        if isinstance(value, int | float):
            return float(value)
    raise UnfitError(f"its norm is a {type(norm).__name__}")


def _norm(norm: nn.Module) -> tuple[mx.array, mx.array | None, bool]:
    """Return what a norm multiplies with, what it adds, and whether it is a layer norm."""
    weight, bias, eps = norm.get("weight"), norm.get("bias"), _epsilon(norm)
    if not isinstance(weight, mx.array) or weight.ndim != 1:
        raise UnfitError(f"its norm is a {type(norm).__name__}")
    if weight.dtype != mx.float32:
        raise UnfitError(f"it computes in {weight.dtype}".replace("mlx.core.", ""))
    x = mx.random.normal((1, weight.shape[0]), key=mx.random.key(1)) + 0.5
    expected = norm(x)
    # Some keep the weight less one.
    for factor in (weight, 1.0 + weight):
        if bias is None and _close(mx.fast.rms_norm(x, factor, eps), expected):
            return factor, None, False
        if _close(mx.fast.layer_norm(x, factor, bias, eps), expected):
            return factor, bias, True
    raise UnfitError(f"its {type(norm).__name__} is neither an RMS norm nor a layer norm")


def _close(ours: mx.array, theirs: mx.array) -> bool:
    return bool(mx.allclose(ours, theirs, rtol=1e-5, atol=1e-6).item())


def _rope(attention: nn.Module) -> str | None:
    return next((key for key in _ROPE if isinstance(attention.get(key), nn.Module)), None)


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
        raise UnfitError(f"its rope is a {type(rope).__name__}")
