"""A module that routes tokens to experts as one operation, where its router is of a known kind.

Families differ in how they choose experts: softmax or sigmoid of the logits, a correction for choosing alone, groups,
weights normalised and scaled. `operation` takes the module's own indices and weights for random input and looks for the
router of the operation (`src/experts_router.cpp`) that gives the same, with the numbers and arrays that the module
holds; then it looks whether the module adds a shared expert. Whatever it takes for found was computed both ways.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from edger1.kernels.experts_fit import SAME, SCALES, Fit, Held, UnfitError, add_projection, difference, numbers

_TOLERANCE = 1e-5
"""Largest difference between two routers' weights, relative to the largest."""
_GROUPS = (("n_group", "topk_group"), ("num_expert_group", "topk_group"))
_SCORES: tuple[dict[str, Any], ...] = (
    {"score": "softmax"},
    {"score": "softmax", "normalize": True},
    {"score": "sigmoid", "normalize": True},
    {"score": "logits", "softmax_chosen": True},
    {"score": "sigmoid"},
    {"score": "sigmoid", "normalize": True, "epsilon": 1e-6},
)


class Probe:
    """What a module with experts answers to random input: few rows, since each of them reads experts of its own.

    `start` makes an unfinished operation with experts in it.
    """

    def __init__(
        self, owner: nn.Module, switch: nn.Module, start: Callable[[], Any], experts: int, hidden: int
    ) -> None:
        self.owner, self.switch, self.start, self.experts = owner, switch, start, experts
        rows = mx.random.normal((1, 4 * len(SCALES), hidden), key=mx.random.key(2))
        self.many = rows * mx.array(SCALES * 4)[:, None]
        self.x = self.many[:, : len(SCALES)]
        self.indices = self.weights = mx.array(0)
        self.expected = self.evaluated(self.x)

    @classmethod
    def of(cls, owner: nn.Module, switch: nn.Module, fit: Fit) -> Probe:
        """Return the probe of a module whose experts are all there, and have been fitted."""
        first: Any = next(m for m in switch.children().values() if hasattr(m, "input_dims"))
        return cls(
            owner, switch, lambda: fit.start(switch, fit.activation(switch)), first.num_experts, first.input_dims
        )

    def _answer(self, *arguments: mx.array) -> mx.array | None:
        answer: Any = self.owner(*arguments)
        return answer if isinstance(answer, mx.array) else None

    def evaluated(self, *arguments: mx.array) -> mx.array | None:
        """Return what the module answers; None if that is no array, or it cannot be called so."""
        try:
            answer = self._answer(*arguments)
            mx.eval(answer)
        except Exception:  # whatever a module raises that is called in another way
            return None
        return answer

    def sums_ranks(self, held: Held) -> bool:
        """Say whether the module's answer is the same, and the experts' weighted sum in it, when it gets `Ranks`."""
        if self.expected is None:
            return False
        held.ranked, held.seen = True, []
        answer = self.evaluated(self.x)
        if len(held.seen) == 1 and answer is not None and difference(answer, self.expected) <= SAME:
            # Where tokens go is worth seeing for more rows. What the experts make of those is never computed.
            self.owner(self.many)
            _, indices, weights = held.seen[-1]
            rows = self.many.shape[1]
            self.indices, self.weights = indices.reshape(rows, -1), weights.reshape(rows, -1)
        else:
            held.ranked = False
        held.seen = None
        return held.ranked

    def takes_routing(self, call: Any) -> bool:
        """Say whether the module, given x, indices and weights, answers with the experts' weighted sum."""
        x = self.x[0]
        indices = mx.random.randint(0, self.experts, (x.shape[0], 2), key=mx.random.key(3)).astype(mx.uint32)
        weights = mx.random.uniform(shape=indices.shape, key=mx.random.key(4))
        answer, sums = self.evaluated(x, indices, weights), call(x, indices, weights)
        return answer is not None and sums is not None and difference(sums, answer) <= SAME


def operation(probe: Probe, fit: Fit) -> Any:
    """Return the operation of the whole module that `probe` has tried out, or None where there is none."""
    for parts in possible_parts(probe, fit):
        try:
            call = build(probe.owner, probe.start, parts)
        except (UnfitError, ValueError):
            continue
        got = call.layer(probe.x)
        if got is not None and probe.expected is not None and difference(got, probe.expected) <= SAME:
            return call
    return None


def possible_parts(probe: Probe, fit: Fit) -> Iterator[Parts]:
    """Yield what a module may consist of beside its experts, without a shared expert first; nothing for no router."""
    if getattr(probe.owner, "sharding_group", None) is not None:
        return
    router = _router(probe, fit)
    if router is not None:
        yield Parts(router)
        for expert, weight in _shared(probe.owner, probe.switch):
            yield Parts(router, expert, weight)


@cache
def fused(original: Any) -> type:
    """Return a subclass of a module's class whose objects run as the operation `_layer` where that applies."""
    call_original = original.__call__

    def call(self: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        held = self._layer
        if held is not None and not args and not kwargs and held.stands(self):
            done = held.call.layer(x)
            if done is not None:
                return done
        return call_original(self, x, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


@cache
def fused_sum(original: Any) -> type:
    """Return a subclass of a module's class, called with x, indices and weights, whose objects run as `_layer`."""
    call_original = original.__call__

    def call(self: Any, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        held = self._layer
        if held is not None and held.call.unchanged(self):
            done: mx.array | None = held.call(x, indices, weights)
            if done is not None:
                return done
        result: mx.array = call_original(self, x, indices, weights)
        return result

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def sum_operation(probe: Probe, fit: Fit) -> Any:
    """Return the operation of a module that is called with x, indices and weights, or None where it is another."""
    call = probe.start()
    for key, child in probe.owner.items():
        if child is probe.switch:
            call.watch(None, key, child)
    call.finish()
    return call if probe.expected is None and probe.takes_routing(call) else None


@dataclass(frozen=True)
class Router:
    """What may be a module's router: its matrix, the module that is called for routing, and how it chooses."""

    owner: nn.Module
    gate: Any
    correction: tuple[nn.Module, str] | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a module with experts consists of beside them."""

    router: Router
    shared: Any = None
    """The expert that every token passes, if there is one."""
    weight: Any = None
    """The layer whose sigmoid the shared expert's answer is multiplied with, if there is one."""


def _router(probe: Probe, fit: Fit) -> Router | None:
    """Return the router whose weights are closest to the module's, None where none gives the same."""
    candidates = [router for owner, gate in _gates(probe.owner) for router in _routers(probe, owner, gate)]
    kind = type(probe.owner)
    # The next module of a kind probably routes as the last did.
    last = candidates[fit.routers[kind] :][:1] if kind in fit.routers else []
    for some in (last, candidates):
        tried = [(*found, n) for n, router in enumerate(some) if (found := _tried(probe, router)) is not None]
        if tried:
            _, best, number = min(tried, key=lambda t: t[0])
            if some is candidates:
                fit.routers[kind] = number
            return best
    return None


def _tried(probe: Probe, router: Router) -> tuple[float, Router] | None:
    """Return how far a router is from the module's, with the scale that it needs; None if that is too far."""
    try:
        indices, weights = build(probe.owner, probe.start, Parts(router)).route(probe.many[0])
    except (UnfitError, ValueError):
        return None
    got = _table(indices, weights, probe.experts)
    expected = _table(probe.indices, probe.weights, probe.experts)
    scale = _scale(probe.owner, router.owner, (expected.sum() / got.sum()).item())
    if scale is None:
        return None
    off = mx.abs(got * scale - expected).max(axis=-1) / mx.maximum(expected.max(axis=-1), 1e-30)
    if not (off.max() <= _TOLERANCE).item():
        return None
    mean: Any = off.mean().item()
    return float(mean), replace(router, settings={**router.settings, "scale": scale})


def _gates(owner: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield what may be the router's matrix, with the module that is called for routing."""
    for name in ("gate", "router"):
        gate = owner.get(name)
        if not isinstance(gate, nn.Module):
            continue
        if isinstance(gate, nn.Linear | nn.QuantizedLinear):
            yield owner, gate
        elif isinstance(gate.get("weight"), mx.array):
            yield gate, gate
        for part in gate.children().values():
            if isinstance(part, nn.Linear | nn.QuantizedLinear):
                yield gate, part


def _number(name: str, *owners: Any) -> Any:
    for owner in owners:
        for holder in (owner, getattr(owner, "config", None), getattr(owner, "args", None)):
            value = getattr(holder, name, None)
            if isinstance(value, int | float):
                return value
    return None


def _routers(probe: Probe, gate_owner: nn.Module, gate: Any) -> Iterator[Router]:
    """Yield what may be the module's router, the likeliest first."""
    corrections = [
        (holder, key)
        for holder in {id(m): m for m in (gate_owner, probe.owner)}.values()
        for key, a in holder.items()
        if isinstance(a, mx.array) and a.shape == (probe.experts,)
    ]
    groups: list[dict[str, Any]] = [{}]
    for names in _GROUPS:
        n, kept = (_number(name, gate_owner, probe.owner) for name in names)
        if n is not None and kept is not None and n > 1:
            settings = {"groups": int(n), "groups_kept": int(kept)}
            groups = [{**settings, "group_score": kind} for kind in ("best_two", "best")] + groups
    for correction, grouped, score in itertools.product([*corrections, None], groups, _SCORES):
        yield Router(gate_owner, gate, correction, {"ranks": probe.indices.shape[1], **score, **grouped})


def build(owner: nn.Module, start: Callable[[], Any], parts: Parts, unwatched: Any = None) -> Any:
    """Return the operation of a module: the experts that `start` gives, its router, its shared expert.

    It watches the module's children, but for the one that somebody else does. Raises UnfitError or ValueError.
    """
    router, gate = parts.router, parts.router.gate
    call = start()
    if isinstance(gate, nn.Linear | nn.QuantizedLinear):
        add_projection(call, "router", gate)
    else:
        call.project("router", gate["weight"])
        call.watch(gate, "weight", gate["weight"])
    correction = None
    if router.correction is not None:
        holder, key = router.correction
        correction = holder[key]
        call.watch(None if holder is owner else holder, key, correction)
    call.router(**router.settings, correction=correction)
    if parts.shared is not None:
        for name in ("gate", "up", "down"):
            linear = parts.shared[f"{name}_proj"]
            add_projection(call, f"shared_{name}", linear)
            call.watch(parts.shared, f"{name}_proj", linear)
        if parts.weight is not None:
            add_projection(call, "shared_weight", parts.weight)
    for holder in {id(m): m for m in (owner, router.owner)}.values():
        for key, child in holder.items():
            if isinstance(child, nn.Module) and child is not unwatched:
                call.watch(None if holder is owner else holder, key, child)
    # How many experts are chosen may be changed, too. The module's own numbers are left to `Held`: holding what they
    # stand in would be a cycle that is never collected.
    if router.owner is not owner:
        for key, number in numbers(router.owner):
            call.watch(vars(router.owner), key, number)
    call.finish()
    return call


def _table(indices: mx.array, weights: mx.array, experts: int) -> mx.array:
    """Return the weights [rows, experts] of all experts, zero for those not chosen."""
    return mx.put_along_axis(mx.zeros((indices.shape[0], experts)), indices, weights, axis=-1)


def _scale(owner: nn.Module, gate_owner: nn.Module, ratio: Any) -> float | None:
    """Return the factor, 1 or a number that the module holds, that `ratio` is but for rounding."""
    if abs(ratio - 1) <= _TOLERANCE:
        return 1.0
    for name in ("routed_scaling_factor", "route_scale", "router_scaling_factor"):
        number = _number(name, gate_owner, owner)
        if number and abs(ratio / number - 1) <= _TOLERANCE:
            return float(number)
    return None


def _shared(owner: nn.Module, switch: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """Yield what may be the shared expert, with what may be the matrix of its weight or without."""
    for name, expert in owner.children().items():
        if expert is switch or not isinstance(expert, nn.Module):
            continue
        # What has a limit or an activation of its own may differ where no probe reaches.
        usual = getattr(expert, "limit", None) is None and "activation" not in expert
        if usual and all(isinstance(expert.get(f"{p}_proj"), nn.Module) for p in ("gate", "up", "down")):
            yield expert, owner.get(f"{name}_gate")
