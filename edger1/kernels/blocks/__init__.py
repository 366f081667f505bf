"""Decoder layers as one operation each, or their attention, where a model's layers have a common shape.

A token of a small model crosses a dozen operations a layer, and passing them from thread to thread takes longer than
reading the weights. `install` looks at the layers of a loaded mlx-lm model: those that are made of the usual parts
(attention over q, k, v, o projections, a gated MLP, norms, a rotary embedding) get a class of their own that gives up
to 16 rows to one operation (`src/decoder.h`), and everything else to the layer as it was. Where the MLP is something
else, experts for one, the half of the layer before it is one operation; where the layer is put together in another way,
its attention is.

Names only suggest what a part is (`recognise.py`). Whether a layer really computes what the operation computes is found
by running both on random input (`probe.py`); a layer that differs is left alone, and the report says so. The operation
writes into the arrays of mlx-lm's `KVCache` and `RotatingKVCache` and keeps their interface (`wire.py`), so that
trimming, copying and saving work as ever. It stands for the weights that the layer had: one that was since given an
adapter, new weights or a gradient to compute runs as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType, ModuleType
from typing import Any

import mlx.nn as nn

from edger1.kernels.blocks import wire
from edger1.kernels.blocks.probe import Planner
from edger1.kernels.blocks.recognise import UnfitError

LAYER, HALF, ATTENTION, LATENT, PARTS = "layer", "attention half", "attention", "latent attention", "parts"


@dataclass(frozen=True)
class LayerReport:
    """How one decoder layer runs."""

    index: int
    kind: str
    """Name of its class."""
    runs: str
    """What of it is one operation: "layer", "attention half" (up to the MLP), "attention", "latent attention" (of
    `edger1.kernels.latent`), or "parts" for nothing."""
    reason: str = ""
    """Why it is no more than that."""


@dataclass
class Blocks:
    """Which layers of a model run as one operation; `uninstall` puts everything back."""

    found: list[LayerReport] = field(default_factory=list)
    _classes: list[tuple[nn.Module, type]] = field(default_factory=list, repr=False)

    @property
    def count(self) -> int:
        """How many layers run as one operation."""
        return self.counts[LAYER]

    @property
    def counts(self) -> Counter[str]:
        """What of a layer is one operation -> how many layers."""
        return Counter(layer.runs for layer in self.found)

    @property
    def layers(self) -> dict[str, int]:
        """Class of layer -> how many of the model's run as one operation."""
        return dict(Counter(layer.kind for layer in self.found if layer.runs == LAYER))

    @property
    def others(self) -> dict[str, int]:
        """Why a layer does not -> how many."""
        return dict(Counter(f"{layer.kind}: {layer.reason}" for layer in self.found if layer.runs != LAYER))

    def describe(self) -> str:
        """Say it in one line, for people."""
        if not self.found:
            return "no decoder layers were found"
        line = f"{self.count} of {len(self.found)} layers as one operation"
        if self.counts[HALF]:
            line += f", {self.counts[HALF]} up to the MLP"
        if self.counts[ATTENTION]:
            line += f", {self.counts[ATTENTION]} in their attention"
        if self.counts[LATENT]:
            line += f", {self.counts[LATENT]} in their latent attention"
        return line + "".join(f"; {n}: {reason}" for reason, n in self.others.items())

    def report(self) -> list[dict[str, Any]]:
        """Return how layers run, those that follow each other and run alike as one: plain JSON values."""
        groups: list[dict[str, Any]] = []
        for layer in self.found:
            how = {"kind": layer.kind, "runs": layer.runs, "reason": layer.reason}
            last = groups[-1] if groups else None
            if last and last["last"] == layer.index - 1 and how == {key: last[key] for key in how}:
                last["last"] = layer.index
            else:
                groups.append({"first": layer.index, "last": layer.index} | how)
        return groups

    def add_latent(self, model: nn.Module, runs: Callable[[nn.Module], bool]) -> None:
        """Note which layers of `model` have latent attention that `runs` as an operation of its own."""
        layers = _layers(model)
        for i, layer in enumerate(self.found):
            if layer.runs == PARTS and any(runs(module) for module in layers[layer.index].modules()):
                self.found[i] = replace(layer, runs=LATENT, reason="its attention caches latents")

    def uninstall(self) -> None:
        """Give the layers their classes back."""
        for module, original in self._classes:
            wire.restore(module, original)
        self._classes, self.found = [], []


def install(
    model: nn.Module, precision: str, extension: ModuleType, exact: Mapping[type, type] = MappingProxyType({})
) -> Blocks:
    """Let of each decoder layer of `model` as much as the operation can stand for run as one.

    The weights must be in place: a layer whose arrays are exchanged later runs as it was. `exact` has the classes of
    the model's modules that round activations, and what each would be without: layers are tried so.
    """
    blocks = Blocks()
    planner = Planner(precision, extension, exact)
    seen: set[int] = set()
    for index, layer in enumerate(_layers(model)):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        kind = type(layer).__name__
        try:
            plan = planner.plan(layer)
        except UnfitError as error:
            blocks.found.append(LayerReport(index, kind, PARTS, str(error)))
            continue
        module = plan.anatomy.attention if plan.runs == ATTENTION else layer
        blocks._classes.append((module, type(module)))
        wire.install(module, plan)
        blocks.found.append(LayerReport(index, kind, plan.runs, plan.reason))
    return blocks


def _layers(model: nn.Module) -> list[nn.Module]:
    layers = getattr(model, "layers", None)
    if isinstance(layers, list | tuple):
        return [layer for layer in layers if isinstance(layer, nn.Module)]
    return [module for module in model.modules() if "self_attn" in module]
