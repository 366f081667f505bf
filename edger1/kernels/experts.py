"""The routed experts of a layer as one operation: mlx-lm's SwitchGLU and SwitchMLP, and the modules that hold them.

A token passes through gate, up, activation and down of each of its experts, and a weighted sum. As separate operations
that is a dozen a layer, with each expert's result in memory between them. `install` gives the switch layers of a model
classes of their own that compute all of it in one (`src/experts_plan.h`).

In mlx-lm the weighted sum is not the switch layer's, which therefore answers with `Ranks` (`experts_ranks.py`). Where
even the router is of a known kind, the whole module is one operation (`experts_layer.py`). Experts that are read from
disk as they are needed have an operation of their own (`experts_streamed.py`).

A module that was since given an adapter, new weights or a gradient to compute runs as it was.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from edger1.kernels import experts_layer
from edger1.kernels.experts_fit import PROJECTIONS, Fit, Held, UnfitError, numbers
from edger1.kernels.experts_ranks import Ranks


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


def install(model: nn.Module, precision: str, extension: ModuleType) -> FusedExperts:
    """Let the experts of each layer of `model` that the operation can stand for run as one; others are left alone.

    The weights must be in place: a module whose arrays are exchanged later runs as it was.
    """
    fused = FusedExperts()
    layers: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    fit = Fit(precision, extension)
    for owner in model.modules():
        for switch in [m for m in owner.children().values() if type(m) in PROJECTIONS]:
            kind: Any = type(owner)
            try:
                held = Held(fit.experts(switch))
            except UnfitError as error:
                others[f"{kind.__name__}: {error}"] += 1
                continue
            probe = experts_layer.Probe.of(owner, switch, fit)
            switch_kind: Any = type(switch)
            fused._swap(switch, _fused(switch_kind), "_experts", held)
            held.ranked = probe.sums_ranks(held)
            layer = experts_layer.operation(probe, fit) if held.ranked else None
            if layer is not None:
                fused._swap(owner, experts_layer.fused(kind), "_layer", Held(layer, numbers=numbers(owner)))
                layers[kind.__name__] += 1
                continue
            experts[kind.__name__] += 1
            sums = experts_layer.sum_operation(probe, fit)
            if sums is not None:
                fused._swap(owner, experts_layer.fused_sum(kind), "_layer", Held(sums))
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
