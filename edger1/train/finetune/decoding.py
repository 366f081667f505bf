"""An adapter merged into its layers for a while, so that whole decoder layers run as one operation.

With an adapter beside each layer a token passes several hundred small operations, and a small model spends longer
between them than in them. Merged, W + s B A in f32, its layers have the shape that the kernels run as one. That costs
four bytes a weight to hold and to read, so it is done for small models alone; and it changes nothing but rounding,
since the products are the same and all is f32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from edger1.train.adapters.layers import dequantized
from edger1.train.adapters.wiring import Adapted

MERGED_BYTES = 1 << 30
"""Of merged layers in f32, at most: they are held beside the model."""
_BYTES_PAID_BY_A_TOKEN = 1 << 18
"""Merging SmolLM2-135M took as long as decoding saves in about 1,200 tokens, a token for 350 KB of merged layers."""


def merge(adapted: Adapted, tokens: int) -> AbstractContextManager[None] | None:
    """Return what puts merged layers into the places of adapted ones within, to decode so many tokens.

    None where that is not possible or not worth it: other adapters than LoRA, experts, large models, few tokens.
    """
    size = merged_bytes(adapted)
    return _merged(adapted) if size and tokens * _BYTES_PAID_BY_A_TOKEN >= size else None


def merged_bytes(adapted: Adapted) -> int:
    """Return what merged layers take beside the model; 0 where `merge` does not merge."""
    each = [hung.adapted for hung in adapted._hung]
    if not all(type(layer) is LoRALinear for layer in each):
        return 0
    size = sum(4 * layer.lora_a.shape[0] * layer.lora_b.shape[1] for layer in each)
    return size if size <= MERGED_BYTES else 0


@contextmanager
def _merged(adapted: Adapted) -> Iterator[None]:
    for hung in adapted._hung:
        layer = _dense(hung.adapted)
        for holder, key in hung.places:
            holder[key] = layer
    try:
        yield
    finally:
        for hung in adapted._hung:
            for holder, key in hung.places:
                holder[key] = hung.adapted


def _dense(layer: Any) -> nn.Linear:
    """Return W + s B A as a layer of its own."""
    linear = layer.linear
    merged = nn.Linear(1, 1, bias=False)
    merged.weight = dequantized(linear) + (layer.scale * layer.lora_b.T) @ layer.lora_a.T
    if "bias" in linear:
        merged.bias = linear.bias.astype(mx.float32)
    mx.eval(merged.parameters())
    merged.freeze()
    merged.eval()
    return merged
