"""KV caches whose rows are quantized, in mlx-lm's interface.

A cached row is rounded in groups along the head dimension (MLX's affine quantization) and lies in memory in one piece:
its codes, then a 16-bit scale and a 16-bit bias for each group. So a cache is two arrays, as where its rows are plain
numbers, and the kernels write it in place as they do those (`kernels/src/packed_rows.h`).

`QuantizedCache`  hands out codes, scales and biases as mlx-lm's `QuantizedKVCache` does, and attention reads those
`ReadBackCache`   hands out what they stand for, of one layer at a time: for attention that takes numbers alone. Of a
                  latent (MLA) only the part that all heads share is rounded: the rotated key beside it is small, and
                  stays in 16 bits
`BatchQuantizedCache`  several sequences side by side, padded to the longest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, create_attention_mask

_LARGEST_HALF = 65504.0
_STEP = 256


class PackedCache:
    """What both have in common.

    `keys` is uint32 [B, H, capacity, words]; so is `values`, or float16 [B, H, capacity, D] where `plain_values`. Grows
    by 256 tokens at a time, as mlx-lm's caches do.
    """

    step = _STEP
    divides_by_tokens = True
    """Any stretch of its arrays is a cache of those tokens."""

    def __init__(self, group_size: int, bits: int, *, plain_values: bool = False) -> None:
        self.keys: Any = None
        self.values: Any = None
        self.offset = 0
        self._format = (bits, group_size, plain_values)

    @property
    def format(self) -> tuple[int, int]:
        """Bits of a code, and how many elements share a scale and a bias."""
        return self._format[:2]

    @property
    def plain_values(self) -> bool:
        """Whether values are not packed."""
        return self._format[2]

    def append(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, H, L, D] of any float dtype; returns all rows as they are held."""
        rows = packed(keys, *self.format), _narrowed(values) if self.plain_values else packed(values, *self.format)
        length, end = keys.shape[2], self.offset + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            more = -(-length // self.step) * self.step
            self.keys, self.values = (
                _grown(old, self.offset, more, row) for old, row in zip((self.keys, self.values), rows, strict=True)
            )
        self.keys[..., self.offset : end, :] = rows[0]
        self.values[..., self.offset : end, :] = rows[1]
        self.offset = end
        return self.keys[..., :end, :], self.values[..., :end, :]

    def size(self) -> int:
        """How many tokens are in it."""
        return self.offset

    @property
    def state(self) -> tuple[Any, ...]:
        """Its arrays, how many tokens are in them, and what says how they are to be read."""
        return self.keys, self.values, self.offset, *self._format

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        self.keys, self.values, offset, bits, group_size, plain = state
        self.offset, self._format = int(offset), (int(bits), int(group_size), bool(plain))

    @classmethod
    def from_state(cls, state: Sequence[Any]) -> Self:
        """Make a cache of what another's `state` was."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return 0 if self.keys is None else int(self.keys.nbytes + self.values.nbytes)

    def empty(self) -> bool:
        """Whether nothing was ever in it."""
        return self.keys is None

    def is_trimmable(self) -> bool:
        """Whether it can forget the last positions."""
        return True

    def trim(self, n: int) -> int:
        """Forget the last `n` positions; returns how many those were."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Return the mask of N positions more, as mlx-lm's caches do."""
        return create_attention_mask(*args, offset=self.offset, **kwargs)


class QuantizedCache(PackedCache):
    """Hands out codes, scales and biases."""

    @property
    def bits(self) -> int:
        """Bits of a code. By this name attention tells quantized caches from others."""
        return self.format[0]

    @property
    def group_size(self) -> int:
        """Elements that share a scale and a bias."""
        return self.format[1]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Append keys and values [B, H, L, D]; returns codes, scales and biases of all keys, and of all values."""
        found = self.append(keys, values)
        return parts(found[0], *self.format), parts(found[1], *self.format)

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> BatchQuantizedCache:
        """Put several sequences side by side."""
        merged: BatchQuantizedCache = BatchQuantizedCache.merge(caches)
        merged.format = caches[0].format
        return merged


class ReadBackCache(PackedCache):
    """Hands out numbers."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values [B, H, L, D]; returns all of them, in the dtypes of what was given."""
        rows = self.append(keys, values)
        if self.plain_values:
            return unpacked(rows[0], *self.format, keys.dtype), rows[1].astype(values.dtype)
        return unpacked(rows[0], *self.format, keys.dtype), unpacked(rows[1], *self.format, values.dtype)


class BatchQuantizedCache(BatchKVCache):
    """mlx-lm's batched cache over packed rows."""

    format = (0, 0)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.format[0]

    @property
    def group_size(self) -> int:
        """Elements that share a scale and a bias."""
        return self.format[1]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        """Append keys and values [B, H, L, D]; returns codes, scales and biases of all keys, and of all values."""
        found = super().update_and_fetch(packed(keys, *self.format), packed(values, *self.format))
        return parts(found[0], *self.format), parts(found[1], *self.format)

    def extract(self, idx: int) -> QuantizedCache:
        """Return one sequence as a cache of its own."""
        plain = super().extract(idx)
        cache = QuantizedCache(self.group_size, self.bits)
        cache.keys, cache.values, cache.offset = plain.keys, plain.values, plain.offset
        return cache


def packed(rows: mx.array, bits: int, group_size: int) -> mx.array:
    """Return rows [..., D] of a float dtype as uint32 [..., D * bits / 32 + D / group_size]."""
    from edger1.kernels.functions import installed

    extension = installed()
    if extension is not None:
        found: mx.array = extension.packed_rows(rows, group_size, bits)
        return found
    # In float32, where the range of a group cannot be too large to be a number.
    wide = _narrowed(rows).astype(mx.float32)
    codes, scales, biases = mx.quantize(wide, group_size=group_size, bits=bits)
    rest = mx.concatenate([scales, biases], axis=-1).astype(mx.float16)
    return mx.concatenate([codes, rest.view(mx.uint32)], axis=-1)


def parts(rows: mx.array, bits: int, group_size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return the codes, scales and biases of packed rows, as views of them."""
    groups = rows.shape[-1] * 32 // (group_size * bits + 32)
    codes, rest = rows[..., :-groups], rows[..., -groups:].view(mx.float16)
    return codes, rest[..., :groups], rest[..., groups:]


def unpacked(rows: mx.array, bits: int, group_size: int, dtype: mx.Dtype) -> mx.array:
    """Return what packed rows stand for."""
    codes, scales, biases = parts(rows, bits, group_size)
    found: mx.array = mx.dequantize(codes, scales.astype(dtype), biases.astype(dtype), group_size=group_size, bits=bits)
    return found


def _narrowed(a: mx.array) -> mx.array:
    """Return an array in 16 bits; what those cannot hold becomes their largest number."""
    if a.dtype == mx.float16:
        return a
    # In float32: bfloat16 has no number between the largest one and what would become infinity.
    return mx.clip(a.astype(mx.float32), -_LARGEST_HALF, _LARGEST_HALF).astype(mx.float16)


def _grown(old: mx.array | None, used: int, more: int, row: mx.array) -> mx.array:
    room = mx.zeros((*row.shape[:2], more, row.shape[3]), row.dtype)
    return room if old is None else mx.concatenate([old[..., :used, :], room], axis=2)
