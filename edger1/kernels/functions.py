"""The CPU kernels in place of MLX's functions, for every model at once.

mlx-lm's models call `mx.fast.rms_norm`, `nn.silu`, `swiglu`, `x @ w` and their like by name, so the name is where they
are replaced. Each replacement takes the same arguments and, for what it does not cover (another device, dtype, axis or
shape), is MLX's own operation; results differ by float rounding only. Nothing here depends on a model or its precision.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers import activations as nn_activations
from mlx_lm.models import activations as lm_activations
from mlx_lm.models import base as lm_base
from mlx_lm.models.cache import KVCache

from edger1.kernels import quantized

_FAST = ("rms_norm", "layer_norm", "rope", "scaled_dot_product_attention")
_CORE = (
    *("matmul", "addmm", "gather_mm", "softmax", "logsumexp", "argmax", "sigmoid", "exp", "tanh"),
    *("sort", "argsort", "partition", "argpartition", "topk"),
)
_NN = ("silu", "gelu", "gelu_approx", "gelu_fast_approx", "sigmoid", "tanh")
_LM = ("swiglu", "swiglu_oai")
# Modules that hold these functions under names of their own, having imported them.
_IMPORTERS = ("mlx.nn", "mlx_lm.")

Restore = tuple[Any, str, Any]
"""An object, an attribute, and the value to give back."""


@dataclass
class Patch:
    """What is replaced, while somebody needs it; `users` counts the installed models."""

    users: int = 0
    restores: list[Restore] = field(default_factory=list)
    replaced: dict[int, tuple[Any, Callable[..., mx.array]]] = field(default_factory=dict)
    extension: ModuleType | None = None
    causal: mx.array | None = None
    """The last mask that a model has asked for as an array, where it hides what comes later and nothing else."""

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute and remember what it was."""
        self.restores.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


_patch = Patch()


def acquire(extension: ModuleType) -> tuple[str, ...]:
    """Put the kernels in the functions' places, also in modules imported since the last call; return the names."""
    if not _patch.users:
        _replace_named(extension)
        _patch.extension = extension
    _patch.users += 1
    _replace_imported()
    return tuple(sorted({name for _, name, _ in _patch.restores}))


def release() -> None:
    """Undo one `acquire`; with the last one every function is MLX's own again."""
    _patch.users -= 1
    if not _patch.users:
        for owner, name, value in reversed(_patch.restores):
            setattr(owner, name, value)
        _patch.restores.clear()
        _patch.replaced.clear()
        _patch.extension = _patch.causal = None


def in_place() -> bool:
    """Say whether the functions stand replaced."""
    return _patch.users > 0


def installed() -> ModuleType | None:
    """Return the extension whose functions stand in MLX's places, or None."""
    return _patch.extension


def is_causal(mask: Any) -> bool:
    """Whether a mask is one that a model has just made, and hides what comes later and nothing else."""
    return mask is not None and mask is _patch.causal


def replacement(value: Any) -> Callable[..., mx.array] | None:
    """Return what stands in for a function of MLX's or mlx-lm's that something holds, or None."""
    found = _patch.replaced.get(id(value))
    return found[1] if found and found[0] is value else None


def _replace_named(extension: ModuleType) -> None:
    groups: tuple[tuple[Any, tuple[str, ...]], ...] = (
        (mx.fast, _FAST),
        (mx, _CORE),
        (nn_activations, _NN),
        (lm_activations, _LM),
    )
    for owner, names in groups:
        for name in names:
            original, ours = getattr(owner, name), getattr(extension, name)
            _patch.replaced[id(original)] = (original, ours)
            _patch.put(owner, name, ours)
    for layer, function in ((nn.SiLU, extension.silu), (nn.Sigmoid, extension.sigmoid), (nn.Tanh, extension.tanh)):
        _patch.put(layer, "__call__", _as_method(function))
    for name, quantized_operation in (("quantized_matmul", _quantized_matmul), ("gather_qmm", _gather_qmm)):
        _patch.put(mx, name, quantized_operation(getattr(mx, name)))
    attention = lm_base.quantized_scaled_dot_product_attention
    ours = _quantized_attention(extension, attention)
    _patch.replaced[id(attention)] = (attention, ours)
    _patch.put(lm_base, attention.__name__, ours)
    masks = lm_base.create_attention_mask
    ours = _attention_mask(masks)
    _patch.replaced[id(masks)] = (masks, ours)
    _patch.put(lm_base, masks.__name__, ours)
    _patch.put(mx.array, "__setitem__", _assignment(extension.assign_rows, mx.array.__setitem__))
    _patch.put(mx.array, "__matmul__", _operator(extension.matmul, mx.array.__matmul__))


def _as_method(function: Callable[[mx.array], mx.array]) -> Callable[[nn.Module, mx.array], mx.array]:
    return lambda _, x: function(x)


def _operator(
    ours: Callable[[mx.array, mx.array], mx.array], original: Callable[[mx.array, Any], mx.array]
) -> Callable[[mx.array, Any], mx.array]:
    def matmul(self: mx.array, other: Any) -> mx.array:
        return ours(self, other) if isinstance(other, mx.array) else original(self, other)

    return matmul


def _assignment(
    assign_rows: Callable[[mx.array, int, int, mx.array], bool], original: Callable[[mx.array, Any, Any], None]
) -> Callable[[mx.array, Any, Any], None]:
    def setitem(self: mx.array, index: Any, value: Any) -> None:
        """Take the way that caches write, `cache[..., a:b, :] = rows`, in place also while a step is still running."""
        if type(index) is tuple and len(index) == 3 and index[0] is Ellipsis and isinstance(value, mx.array):
            rows, columns = index[1], index[2]
            if (
                type(rows) is slice
                and type(rows.start) is int
                and type(rows.stop) is int
                and rows.step is None
                and columns == slice(None)
                and assign_rows(self, rows.start, rows.stop, value)
            ):
                return
        original(self, index, value)

    return setitem


def _applies(x: mx.array, scales: mx.array, group_size: int | None, bits: int | None, mode: str, stream: Any) -> bool:
    default_group, default_bits = (32, 4) if mode == "mxfp4" else (64, 4)
    return quantized._kernels(x, scales, group_size or default_group, bits or default_bits, mode, stream) is not None


def _quantized_matmul(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def quantized_matmul(
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        *,
        stream: Any = None,
    ) -> mx.array:
        # What the kernels do not cover goes to the original here: the module's own way out is this very name.
        if not _applies(x, scales, group_size, bits, mode, stream):
            return original(x, w, scales, biases, transpose, group_size, bits, mode, stream=stream)
        return quantized.quantized_matmul(x, w, scales, biases, transpose, group_size, bits, mode, stream=stream)

    return quantized_matmul


def _gather_qmm(original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def gather_qmm(
        x: mx.array,
        w: mx.array,
        scales: mx.array,
        biases: mx.array | None = None,
        lhs_indices: mx.array | None = None,
        rhs_indices: mx.array | None = None,
        transpose: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        global_scale: mx.array | None = None,
        *,
        sorted_indices: bool = False,
        stream: Any = None,
    ) -> mx.array:
        shared = (x, w, scales, biases, lhs_indices, rhs_indices, transpose, group_size, bits, mode)
        if global_scale is not None or not _applies(x, scales, group_size, bits, mode, stream):
            return original(*shared, global_scale, sorted_indices=sorted_indices, stream=stream)
        return quantized.gather_qmm(*shared, sorted_indices=sorted_indices, stream=stream)

    return gather_qmm


def _quantized_attention(extension: ModuleType, original: Callable[..., mx.array]) -> Callable[..., mx.array]:
    def quantized_scaled_dot_product_attention(
        queries: mx.array,
        q_keys: tuple[mx.array, mx.array, mx.array],
        q_values: tuple[mx.array, mx.array, mx.array],
        scale: float,
        mask: mx.array | str | None,
        group_size: int = 64,
        bits: int = 8,
    ) -> mx.array:
        keys, values = tuple(q_keys), tuple(q_values)
        if extension.covers_quantized_attention(queries, keys, values, mask, group_size, bits):
            return extension.quantized_attention(queries, keys, values, scale, mask, group_size, bits)
        return original(queries, q_keys, q_values, scale, mask, group_size, bits)

    return quantized_scaled_dot_product_attention


def _attention_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_attention_mask(
        h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False
    ) -> Any:
        """Keep in mind which mask it is: who computes it without an array need not have it made, nor read it."""
        mask = original(h, cache, window_size, return_array)
        if return_array and window_size is None and isinstance(mask, mx.array) and type(cache) is KVCache:
            _patch.causal = mask
        return mask

    return create_attention_mask


def _replace_imported() -> None:
    for module in _importing_modules():
        for name, value in list(vars(module).items()):
            ours = replacement(value)
            if ours is not None:
                _patch.put(module, name, ours)


def _importing_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if module is not None and (name.startswith(_IMPORTERS)):
            yield module
