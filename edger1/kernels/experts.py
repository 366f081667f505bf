"""The routed experts of a layer as one operation, in mlx-lm's SwitchGLU and SwitchMLP and in the modules that hold them.

A token passes through gate, up, activation and down of each of its experts, and a weighted sum. As separate operations
that is a dozen a layer, with each expert's result in memory between them. `install` gives the switch layers of a model
classes of their own that compute all of it in one (`src/experts_plan.h`).

In mlx-lm the weighted sum is not the switch layer's: each family's module writes `(y * scores[..., None]).sum(axis=-2)`.
So the switch layer answers with `Ranks`, which is the array [..., ranks, hidden] to whoever takes it for one, but turns
that expression into the operation with the sum inside. Where even the router is of a known kind, the whole module is one
operation (`experts_layer.py`).

Names only suggest what a part is. Whether a module computes what the operation computes is found by running both on
random input, small and large; one that differs is left alone, and the report says so. An operation stands for the weights
that its module had: one that was since given an adapter, new weights or a gradient to compute runs as it was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

_GATED = ("swiglu", "geglu_approx", "geglu")
_LIMITED = ("swiglu_oai", "swiglu_clipped", "swiglu_capped")
_PLAIN = ("gelu", "gelu_approx", "silu", "relu2", "relu")
_PROJECTIONS = {
    SwitchGLU: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    SwitchMLP: {"up": "fc1", "down": "fc2"},
}
SAME = 1e-4
"""Largest difference of two results, relative to the largest element of a row, that rounding explains."""
_ROUNDING = 1e-6
SCALES = (1.0, 1.0, 60.0, 1.0, 60.0)
"""Of the rows of a probe: limits of an activation show at large ones only."""


@dataclass
class FusedExperts:
    """Which modules of a model run their experts as one operation; `uninstall` puts everything back."""

    layers: dict[str, int] = field(default_factory=dict)
    """Class of a module that is one operation with its router -> how many are."""
    experts: dict[str, int] = field(default_factory=dict)
    """Class of a module that routes by itself, and whose experts are one operation -> how many are."""
    others: dict[str, int] = field(default_factory=dict)
    """Why experts are not one operation -> how many."""
    _classes: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many layers' experts run as one operation."""
        return sum(self.layers.values()) + sum(self.experts.values())

    def describe(self) -> str:
        """Say it in one line, for people."""
        total = self.count + sum(self.others.values())
        if not total:
            return "no experts were found"
        line = f"the experts of {self.count} of {total} layers as one operation"
        if self.layers:
            line += f", with their routers in {sum(self.layers.values())}"
        return line + "".join(f"; {n}: {reason}" for reason, n in self.others.items())

    def uninstall(self) -> None:
        """Give the modules their classes back."""
        for module, original in reversed(self._classes):
            module.__class__ = original
            for name in ("_experts", "_layer"):
                vars(module).pop(name, None)
        self._classes, self.layers, self.experts, self.others = [], {}, {}, {}

    def _swap(self, module: nn.Module, replacement: type, name: str, held: Held) -> None:
        self._classes.append((module, type(module)))
        object.__setattr__(module, name, held)
        module.__class__ = replacement


class UnfitError(Exception):
    """A module is not of a shape that the operation computes; the text says what differs."""


@dataclass
class Held:
    """The operation of one module. A copy of the module has other weights and therefore none."""

    call: Any
    ranked: bool = False
    """Whether whoever calls the module is known to cope with `Ranks`."""
    seen: list[tuple[mx.array, mx.array, mx.array]] | None = None
    """While a module is tried out: x, indices and weights of each sum that became the operation."""

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class Ranks:
    """What each expert gives, [..., ranks, hidden], before it is weighted and summed; everywhere else that array."""

    def __init__(self, array: mx.array, held: Held, x: mx.array, indices: mx.array) -> None:
        self._array, self._held, self._x, self._indices = array, held, x, indices

    def __mlx_array__(self) -> mx.array:
        return self._array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)

    def astype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> Any:
        """As of an array."""
        return self if dtype == self._array.dtype else self._array.astype(dtype, *args, **kwargs)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, mx.array) and other.shape == (*self._indices.shape, 1):
            return _Weighted(self, other)
        return self._array * other

    def __rmul__(self, other: Any) -> Any:
        return self * other


class _Weighted:
    """Ranks times their weights, before the sum; everywhere else that product."""

    def __init__(self, ranks: Ranks, weights: mx.array) -> None:
        self._ranks, self._weights = ranks, weights

    @property
    def _array(self) -> mx.array:
        return self._ranks._array * self._weights

    def __mlx_array__(self) -> mx.array:
        return self._array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)

    def sum(self, axis: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        """As of an array; over the axis of ranks it is the operation."""
        ranks = self._ranks
        if axis in (-2, ranks._indices.ndim - 1) and not args and not kwargs:
            done: mx.array | None = ranks._held.call(ranks._x, ranks._indices, self._weights)
            if done is not None:
                if ranks._held.seen is not None:
                    ranks._held.seen.append((ranks._x, ranks._indices, self._weights))
                return done
        return self._array.sum(axis, *args, **kwargs)


def _of_array(name: str) -> Any:
    return lambda self, *args: getattr(self._array, name)(*args)


# Operators are looked up in the class and would miss __getattr__.
for _name in ("add", "radd", "sub", "rsub", "truediv", "rtruediv", "matmul", "neg", "pow", "eq", "getitem", "len"):
    for _class in (Ranks, _Weighted):
        setattr(_class, f"__{_name}__", _of_array(f"__{_name}__"))
for _name in ("mul", "rmul"):
    setattr(_Weighted, f"__{_name}__", _of_array(f"__{_name}__"))


def install(model: nn.Module, precision: str, extension: ModuleType) -> FusedExperts:
    """Let the experts of each layer of `model` that the operation can stand for run as one; others are left alone.

    The weights must be in place: a module whose arrays are exchanged later runs as it was.
    """
    from edger1.kernels import experts_layer

    fused = FusedExperts()
    layers: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    fit = Fit(precision, extension)
    for owner in model.modules():
        for switch in [m for m in owner.children().values() if type(m) in _PROJECTIONS]:
            kind: Any = type(owner)
            try:
                held = Held(fit.experts(switch))
            except UnfitError as error:
                others[f"{kind.__name__}: {error}"] += 1
                continue
            probe = experts_layer.Probe(owner, switch)
            switch_kind: Any = type(switch)
            fused._swap(switch, _fused(switch_kind), "_experts", held)
            held.ranked = probe.sums_ranks(held)
            layer = experts_layer.operation(probe, fit) if held.ranked else None
            if layer is not None:
                fused._swap(owner, experts_layer.fused(kind), "_layer", Held(layer))
            (experts if layer is None else layers)[kind.__name__] += 1
    fused.layers, fused.experts, fused.others = dict(layers), dict(experts), dict(others)
    return fused


@cache
def _fused(original: Any) -> type:
    call_original = original.__call__

    def call(self: Any, x: mx.array, indices: mx.array) -> Any:
        held = self._experts
        if held is not None and held.call.unchanged(self):
            done = held.call(x, indices)
            if done is not None:
                return Ranks(done, held, x, indices) if held.ranked else done
        return call_original(self, x, indices)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


class Fit:
    """Finds the operation that computes what a module does; what fitted one is tried first with the next."""

    def __init__(self, precision: str, extension: ModuleType) -> None:
        self.precision, self.extension = precision, extension
        self._activations: dict[tuple[str, ...], list[str]] = {}

    def experts(self, switch: nn.Module) -> Any:
        """Return the operation of a switch layer. Raises UnfitError where there is none."""
        names = _PROJECTIONS[type(switch)]
        up = _switch_linear(switch, names["up"])
        x, indices = _random_rows(up.input_dims), _random_indices(up.num_experts)
        expected = switch(x, indices)
        tried: list[tuple[float, str, Any]] = []
        activations = self._candidates(switch)
        for activation in activations:
            try:
                call = self._build(switch, activation)
            except ValueError as error:
                raise UnfitError(str(error)) from error
            got = call(x, indices)
            if got is None:
                raise UnfitError("it does not compute in float32")
            tried.append((difference(got, expected), activation, call))
            # The two forms of GELU differ by little more than this.
            if tried[-1][0] <= _ROUNDING:
                break
        off, activation, call = min(tried, key=lambda t: t[0])
        if off > SAME:
            raise UnfitError(f"it computes something else than its parts suggest (off by {off:.1g})")
        activations.sort(key=lambda name: name != activation)
        return call

    def start(self, switch: nn.Module, activation: str) -> Any:
        """Return an unfinished operation with the experts of a switch layer in it, which watches them."""
        limits = _limits(switch.activation)
        call = self.extension.Experts(activation=activation, precision=self.precision, **limits)
        for name, key in _PROJECTIONS[_kind(switch)].items():
            add_projection(call, name, _switch_linear(switch, key))
            call.watch(switch, key, switch[key])
        return call

    def activation(self, switch: nn.Module) -> str:
        """Return the activation that last fitted a switch layer of this kind."""
        return self._candidates(switch)[0]

    def _build(self, switch: nn.Module, activation: str) -> Any:
        call = self.start(switch, activation)
        call.finish()
        return call

    def _candidates(self, switch: nn.Module) -> list[str]:
        if _kind(switch) is SwitchMLP:
            names = _PLAIN
        else:
            # What has a limit shows it at large values only, where those of a probe need not reach.
            names = _LIMITED if _limits(switch.activation) else _GATED
        return self._activations.setdefault(names, list(names))


def _kind(switch: nn.Module) -> type:
    return SwitchGLU if isinstance(switch, SwitchGLU) else SwitchMLP


def _limits(activation: Any) -> dict[str, float]:
    """Return alpha and limit of an activation, where it has a limit."""
    found = {name: getattr(activation, name, getattr(activation, f"_{name}", None)) for name in ("alpha", "limit")}
    limit = found["limit"]
    if not isinstance(limit, int | float) or limit <= 0:
        return {}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _switch_linear(switch: nn.Module, name: str) -> Any:
    linear = switch.get(name)
    quantized = isinstance(linear, QuantizedSwitchLinear) and type(linear).__name__ in _OUR_NAMES
    # Not subclasses in general: an adapter's computes something else.
    if type(linear) is not SwitchLinear and not quantized:
        raise UnfitError(f"its {name} is a {type(linear).__name__}")
    return linear


_OUR_NAMES = ("QuantizedSwitchLinear", "KernelQuantizedSwitchLinear", "QuantizedLinear", "KernelQuantizedLinear")


def add_projection(call: Any, name: str, linear: Any) -> None:
    """Give the operation a linear or switch layer, and watch it. Raises UnfitError for what it does not know."""
    if isinstance(linear, nn.Linear | SwitchLinear) and type(linear) in (nn.Linear, SwitchLinear):
        call.project(name, linear["weight"], bias=linear.get("bias"))
    elif isinstance(linear, nn.QuantizedLinear | QuantizedSwitchLinear) and type(linear).__name__ in _OUR_NAMES:
        if getattr(linear, "global_scale", None) is not None:
            raise UnfitError(f"its {name} has a scale for each expert")
        call.project(
            name, linear["weight"], linear["scales"], linear.get("biases"), linear.get("bias"), linear.group_size,
            linear.bits, linear.mode,
        )  # fmt: skip
    else:
        raise UnfitError(f"its {name} is a {type(linear).__name__}")
    for key in ("weight", "scales", "biases", "bias"):
        if key in linear:
            call.watch(linear, key, linear[key])


def _random_rows(hidden: int) -> mx.array:
    x = mx.random.normal((len(SCALES), hidden), key=mx.random.key(0))
    return x * mx.array(SCALES)[:, None]


def _random_indices(experts: int) -> mx.array:
    ranks = min(2, experts)
    return mx.random.randint(0, experts, (len(SCALES), ranks), key=mx.random.key(1)).astype(mx.uint32)


def difference(got: mx.array, expected: mx.array) -> float:
    """Return the largest difference of two results relative to the largest element of its row."""
    if got.shape != expected.shape:
        return float("inf")
    largest = mx.maximum(mx.abs(expected).max(axis=-1), 1e-30)
    error = (mx.abs(got - expected).max(axis=-1) / largest).max()
    # What is no number would pass for small.
    return abs(float(error.item())) if mx.isfinite(error).item() else float("inf")
