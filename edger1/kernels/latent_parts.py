"""What a layer of latent attention is made of, told to the extension; see `latent.py`.

The layers are those that mlx-lm writes with `embed_q` and `unembed_out`: with queries of low rank or not, with rotated
keys or not, with multipliers (LongCat), an indexer (DeepSeek-V3.2) or a gate (Kimi K3, Bailing) around them; and those
with `kv_b_proj` (see `latent_expanding.py`).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear

_MULTIPLIERS = ("mla_scale_q_lora", "mla_scale_kv_lora")
PLAIN_QUANTIZED = ("QuantizedLinear", "KernelQuantizedLinear")


class UnfitError(Exception):
    """A layer is not of the shape that the operation computes; the text says what differs."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer, and what it multiplies queries and latents with besides."""

    heads: int
    nope: int
    rope: int
    rank: int
    value: int
    q_multiplier: float
    kv_multiplier: float


@dataclass(frozen=True)
class Latent:
    """The operation of one layer, and what the layer does around it. A copy of the layer has none.

    Without the kernels there is no operation and no extension, but the shape.
    """

    call: Any
    around: Any
    """The operation that watches the projections too, if they are known: `layer` and `applies` of it."""
    shape: Shape
    extension: ModuleType | None
    tile_scores: int = 1 << 22
    """Scores of all heads and rows that are held at once where MLX's own operations compute them: 16 MB."""

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


def scale_of(layer: nn.Module) -> float:
    """Return what scores are multiplied with, YaRN's part included."""
    scale = getattr(layer, "scale", getattr(layer, "softmax_scale", None))
    if not isinstance(scale, int | float):
        raise UnfitError("it does not tell its scale")
    return float(scale)


def check_call(layer: nn.Module) -> None:
    """Raise UnfitError where a layer is called with something else than rows, a mask and a cache."""
    names = list(inspect.signature(type(layer).__call__).parameters)
    if names != ["self", "x", "mask", "cache"]:
        raise UnfitError(f"it is called with ({', '.join(names[1:])})")


def output_of(layer: nn.Module) -> str:
    """Return the name of the projection at the end."""
    return "o_proj" if "o_proj" in layer else "dense"


def describe(layer: nn.Module, precision: str, extension: ModuleType, given: Shape | None = None) -> Latent:
    """Describe a layer to the extension: one with `kv_b_proj` where its sizes are `given`.

    Raises UnfitError for parts it lacks, ValueError for what does not fit.
    """
    shape = given or shape_of(layer)
    scale = scale_of(layer)
    matrices = {"kv_b": "kv_b_proj"} if given else {"embed": "embed_q", "unembed": "unembed_out"}

    def start() -> Any:
        call = extension.LatentAttention(
            heads=shape.heads,
            nope=shape.nope,
            rope=shape.rope,
            rank=shape.rank,
            value=shape.value,
            scale=scale * shape.q_multiplier,
            precision=precision,
        )
        for name, key in matrices.items():
            _add_matrices(call, name, part_of(layer, key))
            call.watch(None, key, layer[key])
        return call

    call = start()
    call.finish()
    try:
        around = start()
        _add_projections(around, layer, shape)
        around.finish(whole=True)
    except (UnfitError, ValueError):
        around = None
    return Latent(call, around, shape, extension)


def shape_of(layer: nn.Module) -> Shape:
    """Return the sizes of a layer with `embed_q` and `unembed_out`. Raises UnfitError where it is of another shape."""
    check_call(layer)
    heads, rank, nope = _stack_shape(part_of(layer, "embed_q"))
    _, value, _ = _stack_shape(part_of(layer, "unembed_out"))
    rope = part_of(layer, "kv_a_proj_with_mqa")["weight"].shape[0] - rank
    return Shape(heads, nope, rope, rank, value, *[getattr(layer, name, None) or 1.0 for name in _MULTIPLIERS])


def _stack_shape(part: nn.Module) -> tuple[int, int, int]:
    if not isinstance(part, MultiLinear | QuantizedMultiLinear):
        raise UnfitError(f"its matrices of keys and values are {type(part).__name__}")
    heads, rows, _ = part["weight"].shape
    return heads, rows, columns_of(part)


def _add_matrices(call: Any, name: str, part: nn.Module) -> None:
    quantization = (part.group_size, part.bits, part.mode) if "scales" in part else ()
    call.project(name, part["weight"], part.get("scales"), part.get("biases"), None, *quantization)
    for key in ("weight", "scales", "biases"):
        if part.get(key) is not None:
            call.watch(part, key, part[key])


def _add_projections(call: Any, layer: nn.Module, shape: Shape) -> None:
    if "indexer" in layer or "g_proj" in layer:
        raise UnfitError("it does more than attention and projections")
    names = {"kv_a": "kv_a_proj_with_mqa", "o": output_of(layer)}
    names |= {"q_a": "q_a_proj", "q": "q_b_proj"} if "q_a_proj" in layer else {"q": "q_proj"}
    for name, key in names.items():
        part = part_of(layer, key)
        _add_projection(call, name, part)
        call.watch(None, key, part)
    norms = [("kv", "kv_a_layernorm", shape.kv_multiplier)]
    norms += [("q", "q_a_layernorm", 1.0)] if "q_a_proj" in layer else []
    for name, key, multiplier in norms:
        norm = part_of(layer, key)
        _add_norm(call, name, norm, multiplier)
        call.watch(None, key, norm)
    if "rope" in layer:
        _add_rope(call, layer["rope"])
        call.watch(None, "rope", layer["rope"])


def input_width(layer: nn.Module) -> int:
    """Return the hidden size."""
    return columns_of(part_of(layer, "kv_a_proj_with_mqa"))


def low_rank(layer: Any, x: mx.array) -> mx.array | None:
    """Return what a layer makes its queries from, where that is not x itself."""
    return layer.q_a_layernorm(layer.q_a_proj(x)) if "q_a_proj" in layer else None


def projected(
    layer: Any, shape: Shape, x: mx.array, low: mx.array | None
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Return what a layer projects x [B, L, hidden] and `low_rank` of it to, by its own modules, with nothing rotated.

    Queries [B, H, L, nope] and [B, H, L, rope], latents [B, 1, L, rank] and keys [B, 1, L, rope].
    """
    batch, length, _ = x.shape
    q = layer.q_proj(x) if low is None else layer.q_b_proj(low)
    q = q.reshape(batch, length, shape.heads, shape.nope + shape.rope).transpose(0, 2, 1, 3)
    compressed = layer.kv_a_proj_with_mqa(x)
    k_pe = compressed[..., shape.rank :].reshape(batch, length, 1, shape.rope).transpose(0, 2, 1, 3)
    c = layer.kv_a_layernorm(compressed[..., : shape.rank])
    c = mx.expand_dims(c if shape.kv_multiplier == 1 else c * shape.kv_multiplier, 1)
    return q[..., : shape.nope], q[..., shape.nope :], c, k_pe


def columns_of(part: Any) -> int:
    """Return how many elements the rows have that a layer multiplies."""
    columns: int = part["weight"].shape[-1]
    return columns * 32 // part.bits if "scales" in part else columns


def part_of(owner: nn.Module, name: str) -> Any:
    """Return a module of a module. Raises UnfitError where it is none."""
    part = owner.get(name)
    if not isinstance(part, nn.Module):
        raise UnfitError(f"it has no {name}" if part is None else f"its {name} is not one layer")
    return part


def _add_projection(call: Any, name: str, projection: nn.Module) -> None:
    # Not subclasses in general: an adapter's computes something else.
    if type(projection) is nn.Linear:
        call.project(name, projection["weight"], bias=projection.get("bias"))
    elif isinstance(projection, nn.QuantizedLinear) and type(projection).__name__ in PLAIN_QUANTIZED:
        quantization = (projection.group_size, projection.bits, projection.mode)
        weights = (projection["weight"], projection["scales"], projection.get("biases"), projection.get("bias"))
        call.project(name, *weights, *quantization)
    else:
        raise UnfitError(f"its projections are {type(projection).__name__}")
    for key in ("weight", "scales", "biases", "bias"):
        if key in projection:
            call.watch(projection, key, projection[key])


def _add_norm(call: Any, name: str, norm: nn.Module, multiplier: float) -> None:
    if type(norm) is not nn.RMSNorm:
        raise UnfitError(f"its norm is a {type(norm).__name__}")
    weight = norm["weight"]
    call.norm(name, weight if multiplier == 1 else weight * multiplier, norm.eps)
    call.watch(norm, "weight", weight)


def _add_rope(call: Any, rope: Any) -> None:
    dims = getattr(rope, "dims", getattr(rope, "dim", None))
    freqs = getattr(rope, "_freqs", None)
    if dims is None and freqs is not None:
        dims = 2 * freqs.size
    if dims is None:
        raise UnfitError(f"its rope is a {type(rope).__name__}")
    told = getattr(rope, "traditional", None)
    interleaved = _turns_neighbours(rope, dims) if told is None else bool(told)
    if freqs is not None:
        call.rope(dims, interleaved, None, freqs, 1.0, float(getattr(rope, "mscale", getattr(rope, "_scale", 1.0))))
    elif hasattr(rope, "base") and hasattr(rope, "scale"):
        call.rope(dims, interleaved, float(rope.base), None, float(rope.scale), 1.0)
    else:
        raise UnfitError(f"its rope is a {type(rope).__name__}")


def _turns_neighbours(rope: Any, dims: int) -> bool:
    """Whether a rotation that does not tell turns elements 2 i and 2 i + 1 together, rather than i and i + dims / 2."""
    turned = rope(mx.array([1.0] + [0.0] * (dims - 1))[None, None, None], 1)
    return bool(turned[0, 0, 0, 1].item() != 0)
