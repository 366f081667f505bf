"""A layer of whole-number codes with zero points, and how GPTQ, AWQ and compressed-tensors would store it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from weight_folders import Arrays, bf16, pack_bits


@dataclass
class Layer:
    """codes [n, k] below 2^bits, scales (float32) and zeros [n, groups], order [k]: the group of each column."""

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    order: np.ndarray
    bits: int
    group_size: int

    @staticmethod
    def random(rows: int, columns: int, bits: int, group_size: int, *, act_order: bool = False, seed: int = 0) -> Layer:
        """Scales are float16 numbers; no zero point is 0, which GPTQ's first format cannot say."""
        rng = np.random.default_rng(seed)
        groups = -(-columns // group_size)
        order = np.arange(columns) // group_size
        return Layer(
            rng.integers(0, 1 << bits, (rows, columns)),
            (rng.random((rows, groups)) / 16 + 0.01).astype(np.float16).astype(np.float32),
            rng.integers(1, 1 << bits, (rows, groups)),
            rng.permutation(order) if act_order else order,
            bits,
            group_size,
        )

    def numbers(self) -> np.ndarray:
        """What the layer means, float32 [n, k]."""
        steps = self.codes - self.zeros[:, self.order]
        return (steps * self.scales[:, self.order].astype(np.float64)).astype(np.float32)

    def gptq(self, path: str, dtype: str = "F16", *, offset: int = 1, order: bool = True) -> Arrays:
        arrays = {
            f"{path}.qweight": ("I32", pack_bits(self.codes, self.bits).T),
            f"{path}.qzeros": ("I32", pack_bits((self.zeros.T - offset) % (1 << self.bits), self.bits)),
            f"{path}.scales": self._scales(self.scales.T, dtype),
        }
        return arrays | ({f"{path}.g_idx": ("I32", self.order.astype(np.int32))} if order else {})

    def awq(self, path: str) -> Arrays:
        shuffled = [0, 2, 4, 6, 1, 3, 5, 7]

        def pack(codes: np.ndarray) -> np.ndarray:
            eights = codes.reshape(codes.shape[0], -1, 8)[:, :, shuffled]
            return pack_bits(eights.reshape(codes.shape), 4)

        return {
            f"{path}.qweight": ("I32", pack(self.codes.T)),
            f"{path}.qzeros": ("I32", pack(self.zeros.T)),
            f"{path}.scales": self._scales(self.scales.T, "F16"),
        }

    def compressed(self, path: str, dtype: str = "F16", *, symmetric: bool = False, order: bool = False) -> Arrays:
        arrays = {
            f"{path}.weight_packed": ("I32", pack_bits(self.codes, self.bits)),
            f"{path}.weight_scale": self._scales(self.scales, dtype),
            f"{path}.weight_shape": ("I64", np.array(self.codes.shape)),
        }
        if not symmetric:
            arrays[f"{path}.weight_zero_point"] = ("I32", pack_bits(self.zeros.T, self.bits).T)
        return arrays | ({f"{path}.weight_g_idx": ("I32", self.order.astype(np.int32))} if order else {})

    def _scales(self, scales: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
        return dtype, {"F16": scales.astype(np.float16), "BF16": bf16(scales), "F32": scales}[dtype]
