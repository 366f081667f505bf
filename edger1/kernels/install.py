"""Puts the CPU kernels under a loaded mlx-lm model, by the types of its layers and not by its name.

Quantized layers get a subclass of their own class that calls the kernels in the model's precision; everything else is
reached through the functions that models call (`functions.py`). Weights, names and the interface of every layer stay as
they are, so saving, LoRA and mlx-lm's generator see the model they know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.mla import QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from edger1.kernels import _load, blocks, experts, functions, latent, quantized, stack
from edger1.kernels.blocks import Blocks
from edger1.kernels.experts import FusedExperts
from edger1.kernels.latent import Latents
from edger1.kernels.quantized import Precision


@dataclass
class Installed:
    """What `install` did to a model; `uninstall` puts everything back."""

    precision: str
    layers: dict[str, int] = field(default_factory=dict)
    """Type of layer -> how many of the model's now call the kernels directly."""
    functions: tuple[str, ...] = ()
    """Names of MLX's and mlx-lm's functions that stand replaced."""
    blocks: Blocks = field(default_factory=Blocks)
    """Which decoder layers run as one operation."""
    experts: FusedExperts = field(default_factory=FusedExperts)
    """Which layers run their experts as one operation."""
    latents: Latents = field(default_factory=Latents)
    """Which attention layers compute on cached latents."""
    reason: str = ""
    """Why nothing was replaced, where that is so."""
    _classes: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)
    _attributes: list[tuple[nn.Module, str, Any]] = field(default_factory=list, repr=False)
    _stacks: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    @property
    def stacked(self) -> bool:
        """Whether all layers run as one operation, whose rows have the same bits together as alone."""
        return bool(self._stacks)

    @property
    def active(self) -> bool:
        """Whether the kernels are in place."""
        return bool(self.functions)

    def report(self) -> dict[str, Any]:
        """Return how the model runs, for people who ask later: plain JSON values, see `edger1.runs.of`."""
        return {
            "precision": self.precision,
            "active": self.active,
            "reason": self.reason,
            "summary": self.blocks.describe() if self.active else self.reason,
            "layers": self.blocks.report(),
            "also": self._also(),
        }

    def _also(self) -> list[str]:
        said = ["the layers together as one operation"] if self._stacks else []
        if self.experts.count or self.experts.others:
            said.append(self.experts.describe())
        return said + [line for line in [self.latents.describe()] if line]

    def uninstall(self) -> None:
        """Give the layers their classes back and, if no other model needs the functions, those too."""
        stack.uninstall(self._stacks)
        self.blocks.uninstall()
        self.experts.uninstall()
        self.latents.uninstall()
        for layer, original in self._classes:
            layer.__class__ = original
        for layer, name, value in self._attributes:
            setattr(layer, name, value)
        if self.functions:
            functions.release()
        self._classes, self._attributes, self._stacks, self.functions, self.layers = [], [], [], (), {}


def install(
    model: nn.Module, precision: Precision = "fast", *, fuse: bool = True, float32_activations: bool = True
) -> Installed:
    """Let a model run on the CPU kernels.

    `precision` is "exact" (f32 activations) or "fast" (int8 activations, one scale for 8 values; in more than 16 rows,
    for 32) and concerns quantized layers only.
    Weights and scales may stay in f16 or bf16: with `float32_activations` the embedding gives f32, and all that follows
    is computed in it.
    Where the kernels are not built, switched off, or MLX's default device is a GPU, `reason` says so, and all that is
    changed is that attention over latents is computed on them (`latent.py`).
    `fuse` runs whole decoder layers as one operation where they have the common shape (`blocks.py`), and attention over
    latents. Layers added later (a LoRA adapter fused, say) are reached by uninstalling and installing again.

    Raises ValueError for another precision.
    """
    if precision not in ("exact", "fast"):
        raise ValueError(f'precision is "{precision}"; expected "exact" or "fast"')
    installed = Installed(precision)
    extension, state = _load()
    if extension is None or mx.default_device().type != mx.cpu:
        on_cpu = mx.default_device().type == mx.cpu
        installed.reason = (
            f"EdgeR1's kernels are {state.reason}" if on_cpu else "MLX computes on a GPU, with its own kernels"
        )
        if fuse:
            installed.latents = latent.install(model, precision, None)
        return installed
    installed.functions = functions.acquire(extension)
    try:
        for layer in model.modules():
            _swap_class(layer, precision, float32_activations, installed)
            _swap_held_functions(layer, installed)
        if fuse:
            installed.experts = experts.install(model, precision, extension)
            exact = {variant(precision): variant("exact") for variant in _VARIANTS.values()}
            installed.blocks = blocks.install(model, precision, extension, exact)
            installed._stacks = stack.install(model, precision, extension)
            installed.latents = latent.install(model, precision, extension)
            installed.blocks.add_latent(model, installed.latents.runs)
    except BaseException:
        # The functions are the whole process's: nobody else would give them back.
        installed.uninstall()
        raise
    return installed


def _swap_class(layer: nn.Module, precision: Precision, float32: bool, installed: Installed) -> None:
    # Only the very classes: a subclass may compute something else.
    original = type(layer)
    if original in _VARIANTS:
        _set_class(layer, _VARIANTS[original](precision), installed)
    elif original is nn.QuantizedEmbedding:
        _set_class(layer, _quantized_embedding(precision, float32), installed)
    elif original is nn.Embedding and float32 and layer.weight.dtype != mx.float32:
        _set_class(layer, _Float32Embedding, installed)


def _set_class(layer: nn.Module, replacement: type, installed: Installed) -> None:
    original = type(layer)
    installed._classes.append((layer, original))
    layer.__class__ = replacement
    installed.layers[original.__name__] = installed.layers.get(original.__name__, 0) + 1


def _swap_held_functions(layer: nn.Module, installed: Installed) -> None:
    """Replace functions that a layer keeps as attributes, such as `self.act = nn.silu`."""
    for name, value in list(vars(layer).items()):
        ours = functions.replacement(value)
        if ours is not None:
            installed._attributes.append((layer, name, value))
            setattr(layer, name, ours)


class _Float32Embedding(nn.Embedding):
    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x).astype(mx.float32)


_FEW_ROWS = 16
"""Rows up to which a product is as fast as its matrix can be read."""


def _matmul(layer: Any, x: mx.array, precision: Precision) -> mx.array:
    """Return x @ w.T for a quantized layer."""
    ratio = 0.0
    if layer.mode == "affine" and x.size <= _FEW_ROWS * x.shape[-1]:
        held = vars(layer).get("_bias_ratio")
        if held is None:
            held = quantized.BiasRatio()
            object.__setattr__(layer, "_bias_ratio", held)
        ratio = held.of(layer["weight"], layer["scales"], layer.get("biases"), layer.group_size, layer.bits)
    return _product(layer, x, precision, True, ratio)


def _product(layer: Any, x: mx.array, precision: Precision, transpose: bool, bias_ratio: float = 0.0) -> mx.array:
    return quantized.quantized_matmul(
        x,
        layer["weight"],
        layer["scales"],
        layer.get("biases"),
        transpose=transpose,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        precision=precision,
        bias_ratio=bias_ratio,
    )


@cache
def _quantized_linear(precision: Precision) -> type:
    class KernelQuantizedLinear(nn.QuantizedLinear):
        def __call__(self, x: mx.array) -> mx.array:
            out = _matmul(self, x, precision)
            return out + self["bias"] if "bias" in self else out

    return KernelQuantizedLinear


@cache
def _quantized_embedding(precision: Precision, float32: bool) -> type:
    class KernelQuantizedEmbedding(nn.QuantizedEmbedding):
        def __call__(self, x: mx.array) -> mx.array:
            extension = _load()[0]
            if extension is None or not float32 or not quantized.covers(self.group_size, self.bits, self.mode):
                found = super().__call__(x)
                return found.astype(mx.float32) if float32 else found
            # In float32 throughout: scale * code + bias in 16 bits would round the embedding.
            return extension.dequantized_rows(
                self["weight"],
                self["scales"],
                self.get("biases"),
                x,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )

        def as_linear(self, x: mx.array) -> mx.array:
            return _matmul(self, x, precision)

    return KernelQuantizedEmbedding


@cache
def _quantized_multi_linear(precision: Precision) -> type:
    class KernelQuantizedMultiLinear(QuantizedMultiLinear):
        def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
            return _product(self, x, precision, transpose)

    return KernelQuantizedMultiLinear


@cache
def _quantized_switch_linear(precision: Precision) -> type:
    class KernelQuantizedSwitchLinear(QuantizedSwitchLinear):
        def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
            if self.global_scale is not None:
                return super().__call__(x, indices, sorted_indices)
            out = quantized.gather_qmm(
                x,
                self["weight"],
                self["scales"],
                self.get("biases"),
                rhs_indices=indices,
                transpose=True,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
                sorted_indices=sorted_indices,
                precision=precision,
            )
            return out + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else out

    return KernelQuantizedSwitchLinear


_VARIANTS: dict[type, Callable[[Precision], type]] = {
    nn.QuantizedLinear: _quantized_linear,
    QuantizedMultiLinear: _quantized_multi_linear,
    QuantizedSwitchLinear: _quantized_switch_linear,
}
