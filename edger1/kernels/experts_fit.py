"""Finds the operation that computes what a layer of experts does.

Names only suggest what a part is. Whether a layer computes what the operation computes is found by running both on
random input, small and large. An operation stands for the weights that its layer had: it watches them, and does not
apply once one was exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP

_GATED = ("swiglu", "geglu_approx", "geglu")
_LIMITED = ("swiglu_oai", "swiglu_clipped", "swiglu_capped")
_PLAIN = ("gelu", "gelu_approx", "silu", "relu2", "relu")
PROJECTIONS = {
    SwitchGLU: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    SwitchMLP: {"up": "fc1", "down": "fc2"},
}
SAME = 1e-4
"""Largest difference of two results, relative to the largest element of a row, that rounding explains."""
_ROUNDING = 1e-6
SCALES = (1.0, 1.0, 60.0, 1.0, 60.0)
"""Of the rows of a probe: limits of an activation show at large ones only."""


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

    numbers: tuple[tuple[str, Any], ...] = ()
    """Attributes of the module that the operation was made with."""

    def stands(self, module: nn.Module) -> bool:
        """Say whether the module is still what the operation was made from."""
        attributes = vars(module)
        return all(attributes.get(name) is value for name, value in self.numbers) and bool(self.call.unchanged(module))

    def __deepcopy__(self, _: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()


class Fit:
    """Finds the operation that computes what a module does; what fitted one is tried first with the next."""

    def __init__(self, precision: str, extension: ModuleType) -> None:
        self.precision, self.extension = precision, extension
        self._activations: dict[tuple[str, ...], list[str]] = {}
        self.routers: dict[type, int] = {}
        """Class of a module -> which of the routers that it may have was its."""

    def experts(self, switch: nn.Module) -> Any:
        """Return the operation of a switch layer. Raises UnfitError where there is none."""
        names = PROJECTIONS[type(switch)]
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

    def start(self, switch: nn.Module, activation: str, *, called: bool = False, bank: bool = False) -> Any:
        """Return an unfinished operation with the experts of a switch layer in it, which watches them.

        `called` says that the layer itself will be what calls the operation, which must then not hold it. `bank` says
        that the arrays are overwritten in place, and that somebody else watches the layer.
        """
        limits = _limits(switch.activation)
        call = self.extension.Experts(activation=activation, precision=self.precision, **limits)
        for name, key in projections(switch).items():
            linear = _switch_linear(switch, key)
            add_projection(call, name, linear, **({"in_place": True} if bank else {}))
            if not bank:
                call.watch(None if called else switch, key, linear)
        return call

    def activation(self, switch: nn.Module) -> str:
        """Return the activation that last fitted a switch layer of this kind."""
        return self._candidates(switch)[0]

    def _build(self, switch: nn.Module, activation: str) -> Any:
        call = self.start(switch, activation, called=True)
        call.finish()
        return call

    def _candidates(self, switch: nn.Module) -> list[str]:
        # What has a limit shows it at large values only, where those of a probe need not reach.
        gated = _LIMITED if _limits(switch.activation) else _GATED
        names = _PLAIN if kind(switch) is SwitchMLP else gated
        return self._activations.setdefault(names, list(names))


def kind(switch: nn.Module) -> type:
    """Return which of mlx-lm's switch layers this is or stands for."""
    return SwitchGLU if isinstance(switch, SwitchGLU) else SwitchMLP


def projections(switch: nn.Module) -> dict[str, str]:
    """Return the operation's name -> the layer's for each projection of a switch layer."""
    return PROJECTIONS[kind(switch)]


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


def numbers(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the numbers that a module holds as attributes."""
    return tuple((name, value) for name, value in vars(module).items() if isinstance(value, int | float))


def add_projection(call: Any, name: str, linear: Any, **options: Any) -> None:
    """Give the operation a linear or switch layer, and watch it. Raises UnfitError for what it does not know."""
    if isinstance(linear, nn.Linear | SwitchLinear) and type(linear) in (nn.Linear, SwitchLinear):
        call.project(name, linear["weight"], bias=linear.get("bias"), **options)
    elif isinstance(linear, nn.QuantizedLinear | QuantizedSwitchLinear) and type(linear).__name__ in _OUR_NAMES:
        if getattr(linear, "global_scale", None) is not None:
            raise UnfitError(f"its {name} has a scale for each expert")
        call.project(
            name, linear["weight"], linear["scales"], linear.get("biases"), linear.get("bias"), linear.group_size,
            linear.bits, linear.mode, **options,
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
    found: Any = error.item()
    return abs(float(found)) if mx.isfinite(error).item() else float("inf")
