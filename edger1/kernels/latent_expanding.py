"""Latent attention of which mlx-lm caches the keys and values of every head: DeepSeek-V2, MiniCPM3, Youtu.

Their layers have one matrix, `kv_b_proj`, that makes keys and values of all heads from a latent before they are cached.
What is needed to make them again is the latent and the rotated key, as DeepSeek-V3 caches them: of DeepSeek-V2-Lite a
ninth of the bytes, of DeepSeek-V2 a seventieth. So these layers are given a cache of that layout too (latents [B, 1, S,
rank] as keys, rotated keys [B, 1, S, rope] as values), in mlx-lm's own classes. It is theirs from the first token on:
where the operation steps back (an adapter, exchanged weights), `expanded` computes what the layer does from it. A cache
that came with keys and values of the heads in it, and a quantized one, stay what they are, and the layer as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from edger1.kernels import quantized
from edger1.kernels.latent_parts import (
    PLAIN_QUANTIZED,
    Shape,
    UnfitError,
    check_call,
    columns_of,
    low_rank,
    part_of,
    projected,
    scale_of,
)

PARTS = ("kv_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")


def is_expanding(layer: nn.Module) -> bool:
    """Whether a layer has the parts of such attention."""
    return all(part in layer for part in PARTS)


def shape_of(layer: nn.Module) -> Shape:
    """Return a layer's sizes, without reading a weight. Raises UnfitError where it is of another shape."""
    check_call(layer)
    matrix = part_of(layer, "kv_b_proj")
    plain = type(matrix) is nn.Linear
    if not plain and not (isinstance(matrix, nn.QuantizedLinear) and type(matrix).__name__ in PLAIN_QUANTIZED):
        raise UnfitError(f"its kv_b_proj is a {type(matrix).__name__}")
    if "bias" in matrix:
        raise UnfitError("its kv_b_proj has a bias")
    if not plain and not quantized.covers(matrix.group_size, matrix.bits, matrix.mode):
        raise UnfitError(f"its kv_b_proj is quantized as {matrix.mode}, {matrix.bits} bits by {matrix.group_size}")
    heads = getattr(layer, "num_heads", None)
    # One head's keys and values could not be told from latents.
    if not isinstance(heads, int) or heads < 2:
        raise UnfitError("it does not tell its number of heads" if heads is None else "it has one head")
    scale_of(layer)
    rank = columns_of(matrix)
    rope = part_of(layer, "kv_a_proj_with_mqa")["weight"].shape[0] - rank
    queries = part_of(layer, "q_b_proj" if "q_a_proj" in layer else "q_proj")
    dim, left = divmod(queries["weight"].shape[0], heads)
    rows, over = divmod(matrix["weight"].shape[0], heads)
    nope = dim - rope
    if left or over or rope < 1 or nope < 1 or rows <= nope:
        raise UnfitError(f"its projections do not split into {heads} heads of keys and values")
    return Shape(heads, nope, rope, rank, rows - nope, 1.0, 1.0)


def takes_latents(cache: Any) -> bool:
    """Whether a cache holds latents, or nothing yet and may hold them."""
    if not hasattr(cache, "keys") or not hasattr(cache, "update_and_fetch"):
        return False
    keys = cache.keys
    if keys is None:
        return not hasattr(cache, "bits")
    heads: int = (keys[0] if isinstance(keys, tuple | list) else keys).shape[1]
    return heads == 1


def expanded(layer: Any, shape: Shape, x: mx.array, mask: Any, cache: Any) -> mx.array:
    """Run a layer on x [B, L, hidden] over a cache of latents by its own modules: what mlx-lm's layer computes."""
    q_nope, q_pe, c, k_pe = projected(layer, shape, x, low_rank(layer, x))
    q_pe, k_pe = layer.rope(q_pe, cache.offset), layer.rope(k_pe, cache.offset)
    c, k_pe = cache.update_and_fetch(c, k_pe)
    if hasattr(cache, "bits"):
        # Latents that were quantized after they had been cached.
        c, k_pe = (
            mx.dequantize(w, scales, biases, group_size=cache.group_size, bits=cache.bits).astype(x.dtype)
            for w, scales, biases in (c, k_pe)
        )
    batch, length, _ = x.shape
    kv = layer.kv_b_proj(c[:, 0])
    kv = kv.reshape(batch, -1, shape.heads, shape.nope + shape.value).transpose(0, 2, 1, 3)
    k_pe = mx.broadcast_to(k_pe, (batch, shape.heads, *k_pe.shape[2:]))
    out = base.scaled_dot_product_attention(
        mx.concatenate([q_nope, q_pe], axis=-1),
        mx.concatenate([kv[..., : shape.nope], k_pe], axis=-1),
        kv[..., shape.nope :],
        cache=None,
        scale=scale_of(layer),
        mask=mask,
    )
    result: mx.array = layer.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))
    return result


def layers_of(model: nn.Module) -> list[tuple[nn.Module, Shape]]:
    """Return the layers of a model that will cache latents on the kernels, and their sizes; no weight is read."""
    found = []
    for layer in model.modules():
        if is_expanding(layer):
            try:
                found.append((layer, shape_of(layer)))
            except UnfitError:
                continue
    return found


@contextmanager
def planned(model: nn.Module) -> Iterator[None]:
    """Let a model whose weights are not read yet cache what it will on the kernels, for a plan of its memory."""
    worn = [(layer, type(layer)) for layer, _ in layers_of(model)]
    try:
        for layer, original in worn:
            layer.__class__ = _planned_class(original)
        yield
    finally:
        for layer, original in worn:
            layer.__class__ = original


def _planned_class(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if takes_latents(cache):
            return expanded(self, shape_of(self), x, mask, cache)
        out: mx.array = call_original(self, x, mask, cache)
        return out

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})
