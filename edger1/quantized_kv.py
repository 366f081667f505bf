"""Which KV caches of a model are quantized, and how: 8 or 4 bits in place of what the model computes in.

`choose` looks at what a model caches, by passing a graph through it that nobody evaluates. Caches that grow with the
context are quantized: keys and values, and latents (MLA). Whether attention takes codes is found by trying; where it
wants numbers (attention with sinks, latents), and without our kernels, whose attention over codes needs no memory for
scores, they are read back a layer at a time. Caches that are bounded anyway (a sliding window, a state of fixed size)
stay as they are, and so does an MTP layer's; `Quantization.describe` says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from edger1 import kernels
from edger1.errors import UsageError
from edger1.memory import check_kv_bits
from edger1.mlx_runtime import on_gpu
from edger1.packed_cache import QuantizedCache, ReadBackCache

GROUP_SIZES = (64, 32)
"""Elements that share a scale: the first of these that divides a head."""
LATENT_GROUP_SIZES = (32,)
"""Of a latent, which makes the keys and values of all heads: in groups of 64 the loss was twelve times as large."""
_TRIAL_TOKENS = 2


@dataclass(frozen=True)
class Quantization:
    """How the caches of one model are quantized."""

    bits: int
    groups: tuple[int | None, ...]
    """Elements that share a scale, for each layer's cache; None where that stays as it is."""
    kept: tuple[str, ...] = ()
    """What the caches are that stay as they are."""
    latent: bool = False
    """Whether they hold latents."""
    reads_back: bool = False
    """Whether attention is given numbers and not codes."""

    def caches(self, model: Any) -> list[Any]:
        """Return new caches for the model's layers."""
        return [
            own if group is None else self._cache(group)
            for own, group in zip(make_prompt_cache(model), self.groups, strict=True)
        ]

    def _cache(self, group: int) -> Any:
        if self.reads_back:
            return ReadBackCache(group, self.bits, plain_values=self.latent)
        return QuantizedCache(group, self.bits)

    def describe(self) -> str:
        """Say it in a few words, for people."""
        sizes = sorted({group for group in self.groups if group is not None})
        line = f"{self.bits} bits in groups of {' and '.join(map(str, sizes))}"
        if self.latent:
            line += ", rotated keys in 16 bits"
        if not self.kept:
            return line
        told = ", ".join(f"{count} with {what}" for what, count in Counter(self.kept).items())
        return f"{line}; not quantized: {told}, of {len(self.groups)} layers"


def choose(model: Any, bits: int | None, name: str) -> Quantization | None:
    """Return how `model` is to cache at `bits` bits; None for None. No weight is read.

    Raises UsageError for another number of bits, for a model that has no cache which grows with the context, and for
    one whose heads do not divide into groups.
    """
    check_kv_bits(bits)
    if bits is None:
        return None
    plain = make_prompt_cache(model)
    model(mx.zeros((1, _TRIAL_TOKENS), dtype=mx.int32), cache=plain)
    has_latents = any("kv_a_layernorm" in module for module in model.modules())
    groups: list[int | None] = []
    kept: list[str] = []
    latent = False
    for cache in plain:
        if type(cache) is not KVCache or cache.keys is None:
            groups.append(None)
            kept.append(_what(cache))
            continue
        widths = cache.keys.shape[-1], cache.values.shape[-1]
        # Of a latent and a rotated key the latent is rounded; both are those of one head.
        own = has_latents and cache.keys.shape[1] == 1
        latent = latent or own
        groups.append(_group(widths[:1], LATENT_GROUP_SIZES, name) if own else _group(widths, GROUP_SIZES, name))
    if all(group is None for group in groups):
        raise UsageError(
            f"kv_bits is {bits}, and no KV cache of {name} can be quantized: its layers have {kept[0]}. Leave kv_bits "
            f"out."
        )
    found = Quantization(bits, tuple(groups), tuple(kept), latent)
    reads_codes = not latent and not on_gpu() and kernels.state().available and _takes_codes(model, found)
    return found if reads_codes else replace(found, reads_back=True)


def new_caches(model: Any, quantization: Quantization | None) -> list[Any]:
    """Return new caches for a model's layers."""
    return make_prompt_cache(model) if quantization is None else quantization.caches(model)


def read_back_elements(cache: Any) -> int:
    """Numbers that one token of a cache is read back to; 0 where attention reads codes."""
    if not isinstance(cache, ReadBackCache) or cache.keys is None:
        return 0
    bits, group_size = cache.format
    heads, words = cache.keys.shape[1], [array.shape[-1] for array in (cache.keys, cache.values)]
    each = [count * 32 * group_size // (group_size * bits + 32) for count in words]
    return int(heads * (each[0] + (words[1] if cache.plain_values else each[1])))


def _what(cache: Any) -> str:
    if isinstance(cache, RotatingKVCache):
        return f"a window of {cache.max_size} tokens"
    return f"another kind of cache ({type(cache).__name__})"


def _group(widths: Sequence[int], sizes: Sequence[int], name: str) -> int:
    found = next((size for size in sizes if all(width % size == 0 for width in widths)), None)
    if found is None:
        heads = " and ".join(str(width) for width in sorted(set(widths)))
        raise UsageError(
            f"The KV cache of {name} cannot be quantized: its heads have {heads} elements, and a multiple of "
            f"{min(sizes)} was expected. Leave kv_bits out, and give less context where memory is short."
        )
    return found


def _takes_codes(model: Any, quantization: Quantization) -> bool:
    """Whether the model's attention reads codes; found by trying, with a graph that nobody evaluates."""
    caches = quantization.caches(model)
    try:
        for tokens in (_TRIAL_TOKENS, 1):
            model(mx.zeros((1, tokens), dtype=mx.int32), cache=caches)
    except Exception:
        # What attention does with a tuple in the place of an array can be anything.
        return False
    return True
