"""Numbers of ggml's types whose 4-bit codes stand for entries of a table: IQ4_NL, IQ4_XS and MXFP4.

Layouts and table after ggml-common.h. Two codes are looked up at a time, by their byte, which takes a fraction of the
time of the gguf package's way.
"""

from __future__ import annotations

import functools

import numpy as np

_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def iq4_nl(raw: np.ndarray) -> np.ndarray:
    """Return the numbers of blocks of {f16 d, 16 bytes of two codes}: uint8 [n * 18] -> float32 [n, 32]."""
    blocks = raw.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    return _scaled(_IQ4, blocks[:, 2:], scales)


def iq4_xs(raw: np.ndarray) -> np.ndarray:
    """Return the numbers of blocks of 256: uint8 [n * 136] -> float32 [n * 8, 32].

    A block is {f16 d, 2 upper bits of 8 scales, their 4 lower bits, 128 bytes of two codes}; 32 elements share a scale.
    """
    blocks = raw.reshape(-1, 136)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    upper = np.ascontiguousarray(blocks[:, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)
    lower = blocks[:, 4:8, None] >> np.array([0, 4], np.uint8)
    six = (lower.reshape(-1, 8) & np.uint8(15)) | ((upper & np.uint16(3)) << np.uint16(4)).astype(np.uint8)
    scales = scale * (six.astype(np.int8) - np.int8(32)).astype(np.float32)
    return _scaled(_IQ4, blocks[:, 8:].reshape(-1, 16), scales.reshape(-1, 1))


def mxfp4(raw: np.ndarray) -> np.ndarray:
    """Return the numbers of blocks of {e8m0 scale, 16 bytes of two codes}: uint8 [n * 17] -> float32 [n, 32]."""
    blocks = raw.reshape(-1, 17)
    # Half of 2^(byte - 127), because the table is doubled; the last byte stands for NaN.
    powers = np.append(np.ldexp(np.float32(1), np.arange(-128, 127)).astype(np.float32), np.float32(np.nan))
    return _scaled(_E2M1_DOUBLED, blocks[:, 1:], powers[blocks[:, :1]])


@functools.cache
def _pairs(table: tuple[int, ...]) -> np.ndarray:
    """Return for each byte the entries of its lower and its upper code, both f32 in one u64."""
    byte = np.arange(256)
    entries = np.array(table, np.float32)
    return np.ascontiguousarray(np.stack([entries[byte & 15], entries[byte >> 4]], axis=-1)).view(np.uint64)[:, 0]


def _scaled(table: tuple[int, ...], packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Look up packed codes [n, 16] (byte j holds elements j and j + 16), times scales [n, 1]: float32 [n, 32]."""
    looked = _pairs(table)[packed].view(np.float32).reshape(-1, 16, 2)
    out = np.empty((len(packed), 2, 16), np.float32)
    np.multiply(looked.swapaxes(1, 2), scales[..., None], out=out)
    return out.reshape(-1, 32)
