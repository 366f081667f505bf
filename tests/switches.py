"""Layers of experts to hold the operation against, and what they compute one operation at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx_lm.models import activations  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)


from edger1.kernels import _load  # noqa: E402
from edger1.kernels.experts_fit import Fit  # noqa: E402

EXTENSION: Any = _load()[0]
HIDDEN, INNER, EXPERTS, RANKS = 128, 96, 6, 3
FORMATS = {
    **{f"{bits} bits": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "groups of 64": {"bits": 4, "group_size": 64},
    "groups of 128": {"bits": 4, "group_size": 128},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "f32": None,
    "bf16": mx.bfloat16,
}


class Clipped(nn.Module):
    """As DeepSeek-V4.1 has it."""

    def __init__(self, limit: float = 2.0, after: bool = False) -> None:
        super().__init__()
        self.limit, self.after = limit, after

    def __call__(self, x: Any, gate: Any) -> Any:
        gate = nn.silu(gate) if self.after else nn.silu(mx.minimum(gate, self.limit))
        return mx.minimum(gate, self.limit) * mx.clip(x, -self.limit, self.limit)


class GeGLU(nn.Module):
    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def __call__(self, x: Any, gate: Any) -> Any:
        return self.f(gate) * x


GATED = {
    "swiglu": None,
    "geglu": GeGLU(nn.gelu),
    "geglu_approx": GeGLU(nn.gelu_approx),
    "swiglu_oai": activations.SwigluOAI(1.702, 7.0),
    "swiglu_clipped": Clipped(),
    "swiglu_capped": Clipped(after=True),
}
PLAIN = {
    "gelu": nn.GELU(),
    "gelu_approx": nn.GELU(approx="precise"),
    "silu": nn.SiLU(),
    "relu2": nn.ReLU2(),
    "relu": nn.ReLU(),
}


def switch(activation: Any = None, how: Any = FORMATS["4 bits"], bias: bool = False, inner: int = INNER) -> Any:
    """A random SwitchGLU, or SwitchMLP for an activation without a gate."""
    mx.random.seed(5)
    kind = SwitchMLP if any(activation is a for a in PLAIN.values()) else SwitchGLU
    layer = kind(HIDDEN, inner, EXPERTS, bias=bias, **({} if activation is None else {"activation": activation}))
    if bias:
        for projection in layer.children().values():
            if "bias" in projection:
                projection.bias = mx.random.normal(projection.bias.shape)
    if isinstance(how, dict):
        nn.quantize(layer, **how)
    elif how is not None:
        layer.set_dtype(how)
    mx.eval(layer.parameters())
    return layer


def plain(layer: Any, x: Any, indices: Any) -> Any:
    """What each expert gives, in float64, from the weights as they are."""

    def values(linear: Any) -> Any:
        w = linear["weight"]
        if "scales" in linear:
            parts = [
                a if a is None or a.dtype == mx.uint8 else a.astype(mx.float32)
                for a in map(linear.get, ("scales", "biases"))
            ]
            w = mx.dequantize(w, *parts, linear.group_size, linear.bits, mode=linear.mode)
        bias = linear["bias"] if "bias" in linear else mx.zeros(w.shape[:2])
        return np.array(w.astype(mx.float32)).astype(float), np.array(bias.astype(mx.float32)).astype(float)

    def apply(linear: Any, rows: Any) -> Any:
        w, bias = values(linear)
        chosen = np.array(indices)
        return np.einsum("trnk,trk->trn", w[chosen], rows) + bias[chosen]

    rows = np.repeat(np.array(x).astype(float)[:, None], indices.shape[1], axis=1)
    if isinstance(layer, SwitchGLU):
        up, gate = apply(layer.up_proj, rows), apply(layer.gate_proj, rows)
        hidden, down = layer.activation(mx.array(up, mx.float32), mx.array(gate, mx.float32)), layer.down_proj
    else:
        hidden, down = layer.activation(mx.array(apply(layer.fc1, rows), mx.float32)), layer.fc2
    return apply(down, np.array(hidden).astype(float))


def inputs(rows: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Rows, different experts for each, weights."""
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((rows, HIDDEN)).astype(np.float32))
    indices = np.stack([rng.permutation(EXPERTS)[:RANKS] for _ in range(rows)]).astype(np.uint32)
    weights = mx.array(rng.random((rows, RANKS)).astype(np.float32))
    return x, mx.array(indices), weights


def operation(layer: Any, precision: str = "exact") -> Any:
    if precision == "exact":
        return Fit(precision, EXTENSION).experts(layer)
    # A layer that the kernels are not installed in is no measure for int8 activations.
    call = Fit(precision, EXTENSION).start(layer, "swiglu")
    call.finish()
    return call


def same_bits(a: Any, b: Any) -> bool:
    return bool(mx.array_equal(a.view(mx.uint32), b.view(mx.uint32)).item())
