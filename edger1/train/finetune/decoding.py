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
"""Of merged layers in f32, at most. Beyond, reading them takes longer than what merging saves."""


def merge(adapted: Adapted) -> AbstractContextManager[None] | None:
    """Return what puts merged layers into the places of adapted ones within.

    None where that is not possible or not worth it: other adapters than LoRA, experts, large models.
    """
    return _merged(adapted) if merged_bytes(adapted) else None


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
