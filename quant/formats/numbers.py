"""Numbers of few bits: small floats decoded to float32, and codes packed in 32-bit words as MLX and others pack them.

E4M3 and E5M2 after "FP8 Formats for Deep Learning" (Micikevicius et al., 2022); E2M1 and E8M0 after the OCP
Microscaling Formats (MX) specification 1.0. Packed codes are a stream of bits, lowest first: code i of a row begins at
bit i * bits, and may cross from one word to the next where 32 is no multiple of `bits`.
"""

from __future__ import annotations

import functools

import numpy as np

from edger1.errors import FormatError


def decode_bf16(raw: np.ndarray) -> np.ndarray:
    """Return bfloat16 (as uint16) in float32."""
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def decode_fp8(raw: np.ndarray, kind: str) -> np.ndarray:
    """Return bytes of the kind "F8_E4M3" or "F8_E5M2" in float32; the last axis is contiguous."""
    single, pairs = _fp8_tables(kind)
    if raw.ndim == 0 or raw.shape[-1] % 2 or not raw.flags.c_contiguous:
        return single[raw]
    # Two at a time: half the look-ups.
    out = np.empty(raw.shape, np.float32)
    np.take(pairs, raw.view("<u2"), out=out.view(np.uint64), mode="clip")
    return out


def decode_e8m0(raw: np.ndarray) -> np.ndarray:
    """Return powers of two, 2^(byte - 127), in float32; 255 is NaN."""
    return _e8m0_table()[raw]


def decode_fp4(packed: np.ndarray) -> np.ndarray:
    """Return E2M1 numbers in float32; each byte of the last axis holds two, the first one in its low half."""
    out = np.empty((*packed.shape, 2), np.float32)
    np.take(_fp4_pairs(), packed, out=out.view(np.uint64)[..., 0], mode="clip")
    return out.reshape(*packed.shape[:-1], packed.shape[-1] * 2)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of words [..., w] (32 bits each) as uint8 [..., w * 32 / bits].

    Where 32 w is no multiple of `bits`, the bits left over are dropped.
    """
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data
    if bits == 4:
        out = np.empty((*data.shape, 2), np.uint8)
        np.bitwise_and(data, 15, out=out[..., 0])
        np.right_shift(data, 4, out=out[..., 1])
        return out.reshape(*data.shape[:-1], data.shape[-1] * 2)
    # Eight codes take `bits` bytes, whatever the number of bits.
    count = data.shape[-1] * 8 // bits
    spare = -data.shape[-1] % bits
    if spare:
        data = np.concatenate([data, np.zeros((*data.shape[:-1], spare), np.uint8)], axis=-1)
    grouped = data.reshape(*data.shape[:-1], data.shape[-1] // bits, bits)
    out = np.empty((*grouped.shape[:-1], 8), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        code = grouped[..., byte] >> np.uint8(shift)
        if shift + bits > 8:
            code = code | grouped[..., byte + 1] << np.uint8(8 - shift)
        out[..., index] = code & mask
    return out.reshape(*data.shape[:-1], grouped.shape[-2] * 8)[..., :count]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes [..., n] (uint8, below 2^bits) as uint32 words [..., n * bits / 32]; n is a multiple of 32.

    For 2, 4 and 8 bits a multiple of 32 / bits is enough.
    """
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return (codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)).view("<u4")
    if bits == 2:
        quads = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 4, 4)
        shifted = (quads[..., index] << np.uint8(2 * index) for index in range(4))
        return np.ascontiguousarray(functools.reduce(np.bitwise_or, shifted)).view("<u4")
    grouped = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8)
    out = np.zeros((*grouped.shape[:-1], bits), np.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        out[..., byte] |= grouped[..., index] << np.uint8(shift)
        if shift + bits > 8:
            out[..., byte + 1] |= grouped[..., index] >> np.uint8(8 - shift)
    return out.reshape(*codes.shape[:-1], grouped.shape[-2] * bits).view("<u4")


def check_finite(name: str, values: np.ndarray) -> np.ndarray:
    """Return `values` (float32). Raises FormatError, naming the tensor, where one of them is NaN or infinite."""
    flat = values.reshape(-1)
    # One pass without a temporary; finite numbers may overflow it, and then the slow way decides.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return values
    finite = np.isfinite(flat)
    if not finite.all():
        found = "NaN" if np.isnan(flat).any() else "infinities"
        raise FormatError(
            f"Tensor {name!r} holds {found} ({flat.size - int(finite.sum()):,} of the {flat.size:,} numbers just "
            "read), so the model is damaged or was badly trained. Get another copy of it, or allow such numbers "
            "explicitly."
        )
    return values


@functools.cache
def _fp8_tables(kind: str) -> tuple[np.ndarray, np.ndarray]:
    exponent_bits, mantissa_bits = (4, 3) if kind == "F8_E4M3" else (5, 2)
    byte = np.arange(256)
    bias = (1 << exponent_bits - 1) - 1
    exponent = byte >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = (byte & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
    value = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    if kind == "F8_E4M3":
        # No infinities, one NaN a sign.
        value[byte & 0x7F == 0x7F] = np.nan
    else:
        value[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    table = np.where(byte >> 7 == 1, -value, value).astype(np.float32)
    two = np.arange(1 << 16)
    pairs = np.stack([table[two & 0xFF], table[two >> 8]], axis=1).view(np.uint64)[:, 0]
    return table, pairs


@functools.cache
def _e8m0_table() -> np.ndarray:
    return np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)


@functools.cache
def _fp4_pairs() -> np.ndarray:
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([positive, -positive])
    byte = np.arange(256)
    return np.stack([table[byte & 15], table[byte >> 4]], axis=1).view(np.uint64)[:, 0]
