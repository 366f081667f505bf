"""An adapter fused into the weights under it.

Unquantized weights take what the adapter adds, rounded to their dtype. Quantized ones are dequantized, added to and
quantized again in the mode that they have, which rounds anew: a part of what the adapter learnt is smaller than a step
between two codes. How much goes is measured and returned; `dequantize` keeps it, in 16 bits a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.mla import MultiLinear
from mlx_lm.models.switch_layers import SwitchLinear

from edger1.errors import UsageError
from edger1.train.adapters import places
from edger1.train.adapters.layers import dequantized
from edger1.train.adapters.places import LINEARS, MULTIS, SWITCHES

if TYPE_CHECKING:
    from edger1.train.adapters.wiring import Adapted


@dataclass(frozen=True)
class Fused:
    """What fusing did."""

    modules: int
    requantized: int
    """How many of the modules were quantized again."""
    loss: float
    """Root mean square of the rounding, relative to that of what the adapter adds; 0 where nothing was requantized."""
    worst: float
    """The largest of that among the modules."""
    worst_module: str

    def describe(self) -> str:
        """Say it in one line, for people."""
        line = f"fused into {self.modules} modules"
        if not self.requantized:
            return line
        return (
            f"{line}, {self.requantized} of them quantized again: rounding changed their weights by {self.loss:.0%} of "
            f"what the adapter changes (up to {self.worst:.0%}, in {self.worst_module}); --dequantize keeps all of it"
        )


def fuse(adapted: Adapted, *, dequantize: bool = False) -> Fused:
    """Take an adapter off and leave its effect in the weights; the model is changed in place.

    With `dequantize` the weights that it is over become unquantized, in the dtype of their scales or bfloat16.
    """
    adapted.detach()
    squares: list[tuple[str, float, float]] = []
    done: set[int] = set()
    for path, layer in adapted.layers.items():
        if id(layer) in done:
            continue
        done.add(id(layer))
        linear = layer.linear
        if dequantize and "scales" in linear:
            plain = unquantized(linear)
            _set_matrices(plain, lambda index, layer=layer: fused_matrix(layer, index))
            adapted.rehang(layer, plain)
        elif "scales" in linear:
            rounding, change = _requantize(linear, layer)
            squares.append((path, rounding, change))
        else:
            _set_matrices(linear, lambda index, layer=layer: fused_matrix(layer, index))
    lost, learnt = sum(a for _, a, _ in squares), sum(b for _, _, b in squares)
    shares = [((a / max(b, 1e-30)) ** 0.5, path) for path, a, b in squares]
    worst, where = max(shares, default=(0.0, ""))
    return Fused(len(done), len(squares), (lost / max(learnt, 1e-30)) ** 0.5 if squares else 0.0, worst, where)


def fused_matrix(layer: Any, index: int | None) -> mx.array:
    """Return what an adapted layer multiplies with, f32 [out, in]; `index` picks a matrix of a stack."""
    w = dequantized(layer.linear, index)
    a, b = (layer.lora_a.T, layer.lora_b.T) if index is None else (layer.lora_a[index], layer.lora_b[index])
    w = w + layer.scale * (b @ a)
    if "m" in layer:
        m = layer.m if index is None else layer.m[index]
        w = (m / mx.linalg.norm(w, axis=1))[:, None] * w
    return w


def unquantized(linear: Any) -> Any:
    """Return a layer like a quantized one with plain weights, as yet those of the quantized one."""
    dtype = linear.scales.dtype if linear.mode == "affine" else mx.bfloat16
    plain: Any
    if isinstance(linear, LINEARS):
        plain = nn.Linear(places.inputs(linear), places.outputs(linear), bias="bias" in linear)
    elif isinstance(linear, SWITCHES):
        plain = SwitchLinear(linear.input_dims, linear.output_dims, linear.num_experts, bias="bias" in linear)
    elif isinstance(linear, MULTIS):
        plain = MultiLinear(places.inputs(linear), places.outputs(linear), linear.weight.shape[0])
    elif isinstance(linear, nn.QuantizedEmbedding):
        plain = nn.Embedding(linear.weight.shape[0], places.inputs(linear))
    else:
        raise UsageError(f"{type(linear).__name__} cannot be dequantized here; leave --dequantize out.")
    if "bias" in linear:
        plain.bias = linear.bias
    plain.weight = mx.zeros(plain.weight.shape, dtype)
    _set_matrices(plain, lambda index: dequantized(linear, index))
    return plain


def dequantize_model(model: Any) -> int:
    """Make every quantized layer of a model a plain one; returns how many there were."""
    quantized = [(path, module) for path, module in model.named_modules() if "scales" in module]
    for path, module in quantized:
        # By its path: a module's children in lists are copies, into which nothing could be put.
        model.update_modules(tree_unflatten([(path, unquantized(module))]))
    return len(quantized)


def _set_matrices(linear: Any, matrix: Any) -> None:
    """Set a plain layer's weight, a matrix at a time, in the dtype that it has."""
    dtype = linear.weight.dtype
    if linear.weight.ndim == 2:
        linear.weight = matrix(None).astype(dtype)
    else:
        parts = []
        for index in range(linear.weight.shape[0]):
            parts.append(matrix(index).astype(dtype))
            mx.eval(parts[-1])
        linear.weight = mx.stack(parts)
    mx.eval(linear.weight)


def _requantize(linear: Any, layer: Any) -> tuple[float, float]:
    """Quantize a layer again with its adapter in it; return the squares of the rounding, and of what it adds."""
    if getattr(linear, "global_scale", None) is not None:
        raise UsageError("Experts with a scale for each of them (nvfp4) are not quantized again; use --dequantize.")
    indices: list[int | None] = [None] if linear.weight.ndim == 2 else list(range(linear.weight.shape[0]))
    lost = learnt = 0.0
    parts: dict[str, list[mx.array]] = {"weight": [], "scales": [], "biases": []}
    for index in indices:
        before, wanted = dequantized(linear, index), fused_matrix(layer, index)
        codes = mx.quantize(wanted, linear.group_size, linear.bits, mode=linear.mode)
        for name, array in zip(parts, codes, strict=False):
            # Scales are kept in the dtype that they had.
            parts[name].append(array if name == "weight" else array.astype(linear[name].dtype))
        mx.eval([held[-1] for held in parts.values() if held])
        affine = linear.mode == "affine"
        again = mx.dequantize(
            parts["weight"][-1],
            parts["scales"][-1].astype(mx.float32) if affine else parts["scales"][-1],
            parts["biases"][-1].astype(mx.float32) if affine else None,
            group_size=linear.group_size,
            bits=linear.bits,
            mode=linear.mode,
            dtype=mx.float32,
        )
        rounding: Any = mx.square(again - wanted).sum().item()
        change: Any = mx.square(wanted - before).sum().item()
        lost, learnt = lost + rounding, learnt + change
    for name, held in parts.items():
        if held:
            linear[name] = held[0] if indices == [None] else mx.stack(held)
    mx.eval([linear[name] for name, held in parts.items() if held])
    return lost, learnt
