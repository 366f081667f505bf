"""The adapted layers: mlx-lm's where it has them, and its form for those that it has not.

    LoRA (arXiv:2106.09685)  y = W x + s B A x
    DoRA (arXiv:2402.09353)  y = m / |W + s B A| * (W x + s B A x), norms by rows and without a gradient

A is drawn at random and B starts as zeros, m as the norms of W: nothing changes at first. mlx-lm's DoRALinear makes the
whole matrix W + s B A for each call; here the norms come from |W|^2, which is fixed, and from products with the r rows
of A. A DoRA layer with `factors` set (`settle`) does not compute them at all.

Shapes: `lora_a` is [in, r] and `lora_b` [r, out] over Linear; [n, r, in] and [n, out, r] over a stack of n matrices, of
experts (SwitchLinear) or heads (MultiLinear). `m` is [out] or [n, out].
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from edger1.errors import UsageError
from edger1.train.adapters.places import LINEARS, MULTIS, SWITCHES, inputs, outputs

WEIGHTS = ("lora_a", "lora_b", "m")


def over(linear: Any, kind: str, rank: int, scale: float, dropout: float, key: mx.array) -> Any:
    """Return a layer that adapts `linear` and as yet answers what it does."""
    if kind == "lora" and isinstance(linear, LINEARS):
        layer: Any = LoRALinear.from_base(linear, rank, dropout, scale)
    elif kind == "lora" and isinstance(linear, SWITCHES):
        layer = LoRASwitchLinear.from_base(linear, rank, dropout, scale)
    else:
        classes = _DORA if kind == "dora" else {MULTIS: LoRAMultiLinear}
        own: Any = next(each for types, each in classes.items() if isinstance(linear, types))
        layer = own(linear, rank, scale, dropout)
    shape = (inputs(linear), rank) if isinstance(linear, LINEARS) else (linear.weight.shape[0], rank, inputs(linear))
    bound = inputs(linear) ** -0.5
    layer.lora_a = mx.random.uniform(-bound, bound, shape, key=key)
    mx.eval(layer.lora_a, layer.lora_b)
    return layer


def dequantized(linear: Any, index: int | None = None) -> mx.array:
    """Return a layer's matrix in f32, or matrix `index` of a stack."""
    pick = slice(None) if index is None else index
    weight = linear["weight"][pick]
    if "scales" not in linear:
        return weight.astype(mx.float32)
    scales, biases = linear["scales"][pick], linear.get("biases")
    shared: Any = getattr(linear, "global_scale", None)
    affine = linear.mode == "affine"
    return mx.dequantize(
        weight,
        scales.astype(mx.float32) if affine else scales,
        None if biases is None else biases[pick].astype(mx.float32),
        group_size=linear.group_size,
        bits=linear.bits,
        mode=linear.mode,
        **({} if shared is None else {"global_scale": shared[pick]}),
        dtype=mx.float32,
    )


def row_squares(linear: Any) -> mx.array:
    """Return the sums of squares of a layer's rows, f32 [out] or [n, out]; a matrix at a time is in memory."""
    found = []
    for index in [None] if isinstance(linear, LINEARS) else range(linear.weight.shape[0]):
        found.append(mx.square(dequantized(linear, index)).sum(axis=-1))
        mx.eval(found[-1])
    return found[0] if isinstance(linear, LINEARS) else mx.stack(found)


def _products(linear: Any, rows: mx.array) -> mx.array:
    """Return rows [.., r, in] times the transpose of the layer's matrix or matrices, without its bias."""
    if "scales" not in linear:
        return rows @ linear["weight"].swapaxes(-1, -2).astype(mx.float32)
    return mx.quantized_matmul(
        rows,
        linear["weight"],
        linear["scales"],
        linear.get("biases"),
        True,
        linear.group_size,
        linear.bits,
        linear.mode,
    )


class _Magnitudes:
    """What DoRA's layers share. `down` [.., in, r] and `up` [.., r, out] are A and B as a row passes them."""

    def _start(self: Any) -> None:
        if getattr(self.linear, "global_scale", None) is not None:
            raise UsageError("DoRA cannot go over experts with a scale for each of them (nvfp4); choose LoRA.")
        squares = row_squares(self.linear)
        object.__setattr__(self, "_squares", squares)
        object.__setattr__(self, "_factors", None)
        self.m = mx.sqrt(squares)

    def _norms(self: Any, down: mx.array, up: mx.array) -> mx.array:
        """Return |W + s B A| by rows, f32 [.., out], without a gradient."""
        a, b = mx.stop_gradient(down).swapaxes(-1, -2), mx.stop_gradient(up)
        crossed = (_products(self.linear, a) * b).sum(axis=-2)
        own = (((a @ a.swapaxes(-1, -2)) @ b) * b).sum(axis=-2)
        squares = self._squares + 2 * self.scale * crossed + self.scale**2 * own
        return mx.stop_gradient(mx.sqrt(mx.maximum(squares, 1e-30)))

    def _factor(self: Any, down: mx.array, up: mx.array) -> mx.array:
        """Return m / |W + s B A|, exactly 1 where nothing was learnt."""
        held = self._factors
        if held is not None and all(self[name] is array for name, array in held[0].items()):
            return held[1]
        return self.m / self._norms(down, up)

    def settle(self: Any) -> None:
        """Keep the factors of the weights as they are, until these are exchanged."""
        object.__setattr__(self, "_factors", None)
        factor = self._factor(*self._matrices())
        mx.eval(factor)
        object.__setattr__(self, "_factors", ({name: self[name] for name in WEIGHTS}, factor))


def _scaled(y: mx.array, bias: mx.array | float, factor: mx.array, z: mx.array) -> mx.array:
    """Return factor * (W x + z) + bias, given y = W x + bias; y itself, to the bit, for factor 1 and z 0."""
    return y + ((factor - 1) * (y - bias) + factor * z).astype(y.dtype)


class QuantizableDoRALinear(_Magnitudes, DoRALinear):
    """mlx-lm's DoRALinear over any quantization, without the whole matrix in memory."""

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(p=dropout)
        self.lora_a, self.lora_b = mx.zeros((inputs(linear), rank)), mx.zeros((rank, outputs(linear)))
        self._start()

    def _matrices(self) -> tuple[mx.array, mx.array]:
        return self.lora_a, self.lora_b

    def __call__(self, x: mx.array) -> mx.array:
        """Return the answer to rows x [.., in]."""
        z = self.scale * ((self.dropout(x) @ self.lora_a) @ self.lora_b)
        bias = self.linear.get("bias")
        return _scaled(self.linear(x), 0.0 if bias is None else bias, self._factor(*self._matrices()), z)


class DoRASwitchLinear(_Magnitudes, LoRASwitchLinear):
    """DoRA over stacked experts."""

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(p=dropout)
        self.num_experts = count = linear.num_experts
        self.lora_a, self.lora_b = mx.zeros((count, rank, inputs(linear))), mx.zeros((count, outputs(linear), rank))
        self._start()

    def _matrices(self) -> tuple[mx.array, mx.array]:
        return self.lora_a.swapaxes(-1, -2), self.lora_b.swapaxes(-1, -2)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return what the experts `indices` answer to rows x, as SwitchLinear does."""
        down, up = self._matrices()
        z = self.dropout(x)
        for matrix in (down, up):
            z = mx.gather_mm(z, matrix, rhs_indices=indices, sorted_indices=sorted_indices)
        bias = mx.expand_dims(self.linear.bias[indices], -2) if "bias" in self.linear else 0.0
        factor = mx.expand_dims(self._factor(down, up)[indices], -2)
        return _scaled(self.linear(x, indices, sorted_indices=sorted_indices), bias, factor, self.scale * z)


class LoRAMultiLinear(nn.Module):
    """LoRA over a matrix for each head, which rows pass in either direction: MLA's embed_q and unembed_out."""

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(p=dropout)
        heads = linear.weight.shape[0]
        self.lora_a, self.lora_b = mx.zeros((heads, rank, inputs(linear))), mx.zeros((heads, outputs(linear), rank))

    def _delta(self, x: mx.array, transpose: bool) -> mx.array:
        x = self.dropout(x)
        if transpose:
            return self.scale * ((x @ self.lora_a.swapaxes(-1, -2)) @ self.lora_b.swapaxes(-1, -2))
        return self.scale * ((x @ self.lora_b) @ self.lora_a)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """Return rows of each head times its matrix, or times that transposed, as MultiLinear does."""
        y: mx.array = self.linear(x, transpose)
        return y + self._delta(x, transpose).astype(y.dtype)


class DoRAMultiLinear(_Magnitudes, LoRAMultiLinear):
    """DoRA over a matrix for each head; a magnitude belongs to a row of the matrix as it is stored."""

    def __init__(self, linear: Any, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        self._start()

    def _matrices(self) -> tuple[mx.array, mx.array]:
        return self.lora_a.swapaxes(-1, -2), self.lora_b.swapaxes(-1, -2)

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """See LoRAMultiLinear."""
        factor = mx.expand_dims(self._factor(*self._matrices()), -2)
        if not transpose:
            return super().__call__((x * factor).astype(x.dtype), transpose)
        return _scaled(self.linear(x, transpose), 0.0, factor, self._delta(x, transpose))


_DORA: dict[Any, Any] = {LINEARS: QuantizableDoRALinear, SWITCHES: DoRASwitchLinear, MULTIS: DoRAMultiLinear}
