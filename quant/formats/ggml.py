"""ggml's tensor types: their block sizes, the numbers in them, and which of them MLX can hold as they are.

Sizes and layouts after ggml's ggml.h and ggml-common.h. A row of a quantized tensor is a run of blocks of 32 (or 256)
elements, each with its own scale. MLX's affine format of group size 32 keeps the same numbers in three arrays:

    weight  uint32 [..., rows, columns * bits / 32]   codes, lowest bits first
    scales  f16 or f32 [..., rows, columns / 32]
    biases  f16 or f32 [..., rows, columns / 32]      value = scale * code + bias

so the codes of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 move over as they are, and no number changes. MXFP4 is one of MLX's own
modes: the same e2m1 codes under one e8m0 scale a group of 32, and no biases. Of every other type the numbers are what
the `gguf` package dequantizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats import ggml_tables

GROUP_SIZE = 32


@dataclass(frozen=True)
class GGMLType:
    """A tensor type: so many bytes hold so many elements."""

    name: str
    block_elements: int
    block_bytes: int


TYPES: dict[int, GGMLType] = {
    0: GGMLType("F32", 1, 4),
    1: GGMLType("F16", 1, 2),
    2: GGMLType("Q4_0", 32, 18),
    3: GGMLType("Q4_1", 32, 20),
    6: GGMLType("Q5_0", 32, 22),
    7: GGMLType("Q5_1", 32, 24),
    8: GGMLType("Q8_0", 32, 34),
    9: GGMLType("Q8_1", 32, 36),
    10: GGMLType("Q2_K", 256, 84),
    11: GGMLType("Q3_K", 256, 110),
    12: GGMLType("Q4_K", 256, 144),
    13: GGMLType("Q5_K", 256, 176),
    14: GGMLType("Q6_K", 256, 210),
    15: GGMLType("Q8_K", 256, 292),
    16: GGMLType("IQ2_XXS", 256, 66),
    17: GGMLType("IQ2_XS", 256, 74),
    18: GGMLType("IQ3_XXS", 256, 98),
    19: GGMLType("IQ1_S", 256, 50),
    20: GGMLType("IQ4_NL", 32, 18),
    21: GGMLType("IQ3_S", 256, 110),
    22: GGMLType("IQ2_S", 256, 82),
    23: GGMLType("IQ4_XS", 256, 136),
    24: GGMLType("I8", 1, 1),
    25: GGMLType("I16", 1, 2),
    26: GGMLType("I32", 1, 4),
    27: GGMLType("I64", 1, 8),
    28: GGMLType("F64", 1, 8),
    29: GGMLType("IQ1_M", 256, 56),
    30: GGMLType("BF16", 1, 2),
    34: GGMLType("TQ1_0", 256, 54),
    35: GGMLType("TQ2_0", 256, 66),
    39: GGMLType("MXFP4", 32, 17),
    40: GGMLType("NVFP4", 64, 36),
    41: GGMLType("Q1_0", 128, 18),
}


@dataclass(frozen=True)
class Array:
    """An array as safetensors stores it: `dtype` is the format's name for it; BF16 lies in uint16."""

    dtype: str
    data: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, rows first."""
        return tuple(self.data.shape)


@dataclass(frozen=True)
class Carried:
    """A tensor carried over: `parts` by MLX's suffix. A plain one has the suffix "", no `bits` and no `mode`."""

    parts: dict[str, Array]
    bits: int | None
    mode: str | None = None


def carry_plain(dtype: str, container: str) -> Callable[[np.ndarray, tuple[int, ...]], Carried]:
    """Return the carrier of a plain type: its bytes are copied as they are."""

    def carry(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
        return Carried({"": Array(dtype, raw.view(container).reshape(shape))}, None)

    return carry


def carry_q4_0(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry over blocks of {f16 d, 16 bytes of two codes}: value = d * (code - 8)."""
    blocks = _blocks(raw, shape, 18)
    scales = _halves(blocks, 0)
    return _affine(_pack_nibbles(blocks[..., 2:]), scales, _multiply(scales, -8), 4)


def carry_q4_1(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry over blocks of {f16 d, f16 m, 16 bytes of two codes}: value = d * code + m."""
    blocks = _blocks(raw, shape, 20)
    return _affine(_pack_nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2), 4)


def carry_q5_0(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry over blocks of {f16 d, u32 fifth bits, 16 bytes of two codes}: value = d * (code - 16)."""
    blocks = _blocks(raw, shape, 22)
    scales = _halves(blocks, 0)
    return _affine(_pack_fives(blocks[..., 2:6], blocks[..., 6:]), scales, _multiply(scales, -16), 5)


def carry_q5_1(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry over blocks of {f16 d, f16 m, u32 fifth bits, 16 bytes of two codes}: value = d * code + m."""
    blocks = _blocks(raw, shape, 24)
    return _affine(_pack_fives(blocks[..., 4:8], blocks[..., 8:]), _halves(blocks, 0), _halves(blocks, 2), 5)


def carry_q8_0(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry over blocks of {f16 d, 32 signed bytes}: value = d * byte. MLX's codes are unsigned: byte + 128."""
    blocks = _blocks(raw, shape, 34)
    scales = _halves(blocks, 0)
    codes = blocks[..., 2:] ^ np.uint8(0x80)
    return _affine(_words(codes), scales, _multiply(scales, -128), 8)


def carry_mxfp4(raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry over blocks of {e8m0 scale, 16 bytes of two e2m1 codes}: value = 2^(scale - 127) * code."""
    blocks = _blocks(raw, shape, 17)
    parts = {
        "weight": Array("U32", _pack_nibbles(blocks[..., 1:])),
        "scales": Array("U8", np.ascontiguousarray(blocks[..., 0])),
    }
    return Carried(parts, 4, "mxfp4")


CARRIERS: dict[str, Callable[[np.ndarray, tuple[int, ...]], Carried]] = {
    "F32": carry_plain("F32", "<f4"),
    "F16": carry_plain("F16", "<f2"),
    "BF16": carry_plain("BF16", "<u2"),
    "Q4_0": carry_q4_0,
    "Q4_1": carry_q4_1,
    "Q5_0": carry_q5_0,
    "Q5_1": carry_q5_1,
    "Q8_0": carry_q8_0,
    "MXFP4": carry_mxfp4,
}
"""The types that MLX can hold without loss, each with the function that carries a tensor's raw bytes over."""

CODE_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "MXFP4": 4}
"""Bits of a code in MLX's arrays, for the quantized ones among `CARRIERS`."""

_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

_TABLES = {"IQ4_NL": ggml_tables.iq4_nl, "IQ4_XS": ggml_tables.iq4_xs, "MXFP4": ggml_tables.mxfp4}

_WITHOUT_NUMBERS = ("Q8_1", "Q8_K", "Q1_0")
"""What llama.cpp keeps activations in, and what the gguf package does not read."""


def carry(name: str, kind: GGMLType, raw: np.ndarray, shape: tuple[int, ...]) -> Carried:
    """Carry the raw bytes (uint8) of tensor `name`, or of some of its rows, over to MLX's arrays.

    Raises FormatError where the type is not supported, the tensor is no matrix though quantized, or its scales are not
    finite numbers.
    """
    check_type(name, kind, shape)
    carried = CARRIERS[kind.name](raw, shape)
    if not all(_is_finite(part) for suffix, part in carried.parts.items() if suffix in ("scales", "biases")):
        raise FormatError(f"tensor {name!r} ({kind.name}) has scales that are not finite; the file is damaged.")
    return carried


def check_type(name: str, kind: GGMLType, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless a tensor of this type and shape can be carried over."""
    if kind.name not in CARRIERS:
        raise FormatError(
            f"tensor {name!r} has the type {kind.name}, which is not supported; {', '.join(CARRIERS)} are. "
            "Get the model in one of those, or as an MLX folder."
        )
    if kind.block_elements > 1 and len(shape) < 2:
        raise FormatError(
            f"tensor {name!r} is quantized ({kind.name}) but has {len(shape)} dimensions instead of 2 or more."
        )


def part_names(kind: GGMLType) -> tuple[str, ...]:
    """Return the suffixes of the arrays that `carry` makes of a tensor of this type."""
    if kind.block_elements == 1:
        return ("",)
    return ("weight", "scales") if kind.name == "MXFP4" else ("weight", "scales", "biases")


def has_numbers(kind: GGMLType) -> bool:
    """Say whether `dequantize` knows this type."""
    return kind.name not in _WITHOUT_NUMBERS


def dequantize(kind: GGMLType, raw: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the numbers in raw bytes (uint8) as float32 of `shape`; integers keep their type."""
    if kind.name in _PLAIN:
        data = raw.view(_PLAIN[kind.name]).reshape(shape)
        return data.astype(np.float32, copy=False) if data.dtype.kind == "f" else data
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(shape)
    if not raw.size:
        return np.empty(shape, np.float32)
    if kind.name in _TABLES:
        return _TABLES[kind.name](raw).reshape(shape)
    # Importing it takes a quarter of a second, which a file without such types need not pay.
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as numbers

    rows = raw.reshape(-1, shape[-1] // kind.block_elements * kind.block_bytes)
    with np.errstate(all="ignore"):
        found: np.ndarray = numbers(rows, GGMLQuantizationType[kind.name])
    return found.reshape(shape)


def carried_bytes(kind: GGMLType, shape: tuple[int, ...]) -> int:
    """Return an upper bound of the bytes that a tensor takes once carried over (f32 scales and biases)."""
    elements = math.prod(shape)
    if kind.block_elements == 1:
        return elements * kind.block_bytes
    return elements * CODE_BITS[kind.name] // 8 + elements // GROUP_SIZE * 8


def _is_finite(part: Array) -> bool:
    # All ones stand for NaN among e8m0 scales.
    return bool((part.data != 255).all() if part.dtype == "U8" else np.isfinite(part.data).all())


def _blocks(raw: np.ndarray, shape: tuple[int, ...], block_bytes: int) -> np.ndarray:
    return raw.reshape(*shape[:-1], shape[-1] // GROUP_SIZE, block_bytes)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return the f16 at byte `at` of each block: [..., blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0]


def _words(codes: np.ndarray) -> np.ndarray:
    """Join the bytes of all blocks of a row: uint8 [..., rows, blocks, n] -> uint32 [..., rows, blocks * n / 4]."""
    return codes.reshape(*codes.shape[:-2], -1).view("<u4")


def _pack_nibbles(packed: np.ndarray) -> np.ndarray:
    """Reorder ggml's nibbles (byte j holds elements j and j + 16) to MLX's (elements in sequence, lowest bits first).

    packed: uint8 [..., rows, blocks, 16]; returns uint32 [..., rows, blocks * 4].
    """
    low, high = packed & np.uint8(0x0F), packed >> np.uint8(4)
    ordered = np.empty_like(packed, order="C")
    ordered[..., :8] = low[..., 0::2] | low[..., 1::2] << np.uint8(4)
    ordered[..., 8:] = high[..., 0::2] | high[..., 1::2] << np.uint8(4)
    return _words(ordered)


def _pack_fives(fifth: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Join nibbles (ordered as in `_pack_nibbles`) with their fifth bits (bit j belongs to element j).

    fifth: uint8 [..., rows, blocks, 4], packed: uint8 [..., rows, blocks, 16]; returns uint32 [..., rows, blocks * 5]:
    eight elements take five bytes, lowest bits first.
    """
    high = np.unpackbits(np.ascontiguousarray(fifth), axis=-1, bitorder="little") << np.uint8(4)
    codes = np.concatenate([packed & np.uint8(0x0F), packed >> np.uint8(4)], axis=-1) | high
    eights = codes.reshape(*codes.shape[:-1], 4, 8)
    out = np.zeros((*eights.shape[:-1], 5), np.uint8)
    for element in range(8):
        byte, shift = divmod(5 * element, 8)
        code = eights[..., element]
        # What is shifted out of a byte goes into the next.
        out[..., byte] |= code << np.uint8(shift)
        if shift > 3:
            out[..., byte + 1] |= code >> np.uint8(8 - shift)
    return _words(out.reshape(*out.shape[:-2], 20))


def _multiply(scales: np.ndarray, factor: int) -> np.ndarray:
    """Return scales * factor in f16 where that is exact for all of them, else in f32, where it always is."""
    exact = scales.astype(np.float32) * np.float32(factor)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), exact) else exact


def _affine(weight: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int) -> Carried:
    # MLX wants scales and biases of one dtype.
    dtype = np.promote_types(scales.dtype, biases.dtype)
    label = "F16" if dtype == np.float16 else "F32"
    parts = {
        "weight": Array("U32", weight),
        "scales": Array(label, scales.astype(dtype)),
        "biases": Array(label, biases.astype(dtype)),
    }
    return Carried(parts, bits, "affine")
