"""The experts of a layer whose weights come from disk, as one operation over the slots of a bank.

The switch layer's arrays are the bank's then: [slots, n, k], overwritten in place, fewer slots than experts perhaps.
So its module cannot be run to find what it computes (`experts_fit.py`), and its parts are tried out apart. Router and
shared expert: in a copy of the module that has a stand-in without weights in the switch layer's place. The activation:
in a switch layer of its own, of two small experts. The operation is put together from what was found and from the bank.

Routing needs no bank: `route` gives experts, somebody finds (and fills) their slots, and `given` computes with those.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from edger1.kernels.experts_fit import SAME, Fit, Held, UnfitError, difference, kind, numbers, projections
from edger1.kernels.experts_layer import Parts, Probe, Router, build, possible_parts
from edger1.kernels.experts_ranks import Ranks

_FEW_ROWS = 16
"""Rows up to which the shared expert is inside the operation."""
_BUFFERS = {"weight": "codes", "scales": "scales", "biases": "biases", "bias": "bias"}
_SMALL = 64

Mapped = Mapping[tuple[str, str], Sequence[Any]]
"""(a projection of the switch layer, one of its arrays) -> a buffer for each expert: ("up_proj", "scales") -> ..."""


@dataclass(frozen=True)
class StreamedOperation:
    """The operation over a bank. x is [..., hidden] in float32, slots are [..., ranks] integers, weights float32.

    Index s names slot s; where a map was given, `slots + e` names expert e on it. With `arrivals` (the extension's
    `Arrivals`) the operation waits for slots that are still to be read, while it computes the others. Each method gives
    None where the operation does not apply (another dtype or device, a gradient to compute).
    """

    slots: int
    """How many slots the bank has."""
    mapped: bool
    """Whether experts on a map lie behind them."""
    has_router: bool
    """Whether `route` and `given` stand for the whole module; otherwise it routes in its own code."""
    takes_ranks: bool
    """Whether the module does the same, and has the weighted sum inside, when its switch layer answers with `Ranks`."""
    _call: Any
    _shared: Any
    _weight: Any
    _linears: tuple[tuple[str, Any], ...]
    _numbers: tuple[tuple[str, Any], ...]

    def stands(self, owner: nn.Module, switch: nn.Module) -> bool:
        """Say whether a module and its switch layer are still what the operation was made from."""
        attributes = vars(owner)
        return (
            all(switch.get(name) is linear for name, linear in self._linears)
            and all(attributes.get(name) is value for name, value in self._numbers)
            and bool(self._call.unchanged(owner))
        )

    def route(self, x: mx.array) -> tuple[mx.array, mx.array] | None:
        """Return the experts (not slots) [..., ranks] of each row of x, and their weights."""
        found: tuple[mx.array, mx.array] | None = self._call.route(x)
        return found

    def given(self, x: mx.array, slots: mx.array, weights: mx.array, arrivals: Any = None) -> mx.array | None:
        """Return what the module answers, [..., hidden], where it has chosen these: the shared expert is included."""
        done: mx.array | None = self._call.given(x, slots, weights, arrivals)
        if done is not None or self._shared is None:
            return done
        if x.size <= _FEW_ROWS * x.shape[-1] or (done := self._call(x, slots, weights, arrivals)) is None:
            return None
        shared: mx.array = self._shared(x)
        return done + (shared if self._weight is None else mx.sigmoid(self._weight(x)) * shared)

    def summed(self, x: mx.array, ranks: mx.array, weights: mx.array) -> mx.array | None:
        """Return what `given` answers, to the bit, from what `ranks` gave for x [..., ranks, hidden]: up to 16 rows."""
        done: mx.array | None = self._call.summed(x, ranks, weights)
        return done

    def ranks(self, x: mx.array, slots: mx.array, arrivals: Any = None) -> mx.array | None:
        """Return what each rank's expert gives, [..., ranks, hidden]."""
        done: mx.array | None = self._call(x, slots, None, arrivals)
        return done


def streamed(
    owner: nn.Module, switch: nn.Module, fit: Fit, *, experts: int | None = None, mapped: Mapped | None = None
) -> StreamedOperation:
    """Find the operation of a module that holds a switch layer, over the bank that the layer's arrays are.

    `experts` is how many the router chooses among; default: as many as there are slots. `mapped` adds all of them
    behind the slots, where they lie on a memory map. `fit` is best shared by the layers of a model. Operations hold
    neither `owner` nor `switch`, which may therefore hold them.

    Raises UnfitError where there is none, or the bank's arrays cannot be read where they lie; ValueError for buffers
    that are of another size than a slot's rows, or not aligned to what is in them.
    """
    activation = _activation(switch, fit)
    linears = tuple((name, switch[name]) for name in projections(switch).values())
    first = linears[0][1]

    def start() -> Any:
        try:
            call = fit.start(switch, activation, bank=True)
        except ValueError as error:
            raise UnfitError(str(error)) from error
        for name, key in projections(switch).items() if mapped else ():
            call.append_mapped(name, **{_BUFFERS[k]: list(b) for (p, k), b in (mapped or {}).items() if p == key})
        return call

    alone = start()
    alone.finish()
    stand_in = _StandIn(experts or first.num_experts)
    twin = _with(owner, switch, stand_in)
    probe = Probe(twin, stand_in, lambda: _one_expert(fit, first.input_dims), stand_in.experts, first.input_dims)
    takes_ranks = probe.sums_ranks(stand_in.held)
    parts = _parts(probe, stand_in, fit) if takes_ranks else None
    if parts is not None:
        parts = replace(parts, router=_of(parts.router, twin, owner))
    return StreamedOperation(
        slots=first["weight"].shape[0],
        mapped=bool(mapped),
        has_router=parts is not None,
        takes_ranks=takes_ranks,
        _call=alone if parts is None else build(owner, start, parts, unwatched=switch),
        _shared=parts and parts.shared,
        _weight=parts and parts.weight,
        _linears=linears,
        _numbers=numbers(owner),
    )


class _StandIn(nn.Module):
    """A switch layer without weights: expert e gives x times a number of its own, or nothing while `silent`."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts, self.silent, self.held = experts, False, Held(self.weighted)
        self._gains = mx.random.uniform(0.5, 1.5, (experts,), key=mx.random.key(6))

    def __call__(self, x: mx.array, indices: mx.array) -> Any:
        gains = mx.zeros((self.experts,)) if self.silent else self._gains
        ranks = mx.expand_dims(x, -2) * gains[indices][..., None]
        return Ranks(ranks, self.held, x, indices) if self.held.ranked else ranks

    def weighted(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        ranked, self.held.ranked = self.held.ranked, False
        ranks: mx.array = self(x, indices)
        self.held.ranked = ranked
        return (ranks * weights.reshape(*indices.shape, 1)).sum(-2)


def _with(owner: nn.Module, switch: nn.Module, stand_in: nn.Module) -> nn.Module:
    """Return a copy of a module, with the very children of it but for the switch layer."""
    twin = copy.copy(owner)
    for key, child in owner.items():
        if child is switch:
            twin[key] = stand_in
    return twin


def _one_expert(fit: Fit, hidden: int) -> Any:
    """Return an unfinished operation that gives nothing but what a shared expert will: its expert is zero."""
    call = fit.extension.Experts(precision=fit.precision)
    for name in ("gate", "up"):
        call.project(name, mx.zeros((1, 1, hidden)))
    call.project("down", mx.zeros((1, hidden, 1)))
    return call


def _parts(probe: Probe, stand_in: _StandIn, fit: Fit) -> Parts | None:
    """Return the router and shared expert with which the operation gives what the module does, None for none."""
    stand_in.silent = True
    shared_only = probe.evaluated(probe.x)
    stand_in.silent = False
    if shared_only is None or probe.expected is None:
        return None
    for parts in possible_parts(probe, fit):
        try:
            call = build(probe.owner, probe.start, parts)
        except (UnfitError, ValueError):
            continue
        indices, weights = call.route(probe.x)
        # Apart from the experts' sum, in which a small one would not be seen; row by row, since all ranks have the one
        # expert there is, and more than 16 of them would go another way.
        nothing = mx.zeros_like(weights[:, :1])
        rows = mx.split(probe.x, probe.x.shape[1], axis=1)
        shared = mx.concatenate([call.given(row, nothing.astype(mx.uint32), nothing) for row in rows], axis=1)
        whole = stand_in.weighted(probe.x, indices, weights) + shared
        if difference(shared, shared_only) <= SAME and difference(whole, probe.expected) <= SAME:
            return parts
    return None


def _of(router: Router, twin: nn.Module, owner: nn.Module) -> Router:
    """Return what was found in a module's copy as the module's own."""
    correction = router.correction
    if correction is not None and correction[0] is twin:
        correction = (owner, correction[1])
    return replace(router, owner=owner if router.owner is twin else router.owner, correction=correction)


def _activation(switch: Any, fit: Fit) -> str:
    """Return the activation of a switch layer. Raises UnfitError if the operation has it not."""
    small: Any = kind(switch)(_SMALL, _SMALL, 2, activation=switch.activation)
    for n, linear in enumerate(small.children().values()):
        if "weight" in linear:
            linear.weight = mx.random.normal(linear.weight.shape, key=mx.random.key(n)) / _SMALL**0.5
    try:
        fit.experts(small)
    except UnfitError:
        raise
    except Exception as error:  # whatever an activation raises that needs a width of its own
        raise UnfitError(f"its activation is not to be tried out apart: {error}") from error
    return fit.activation(small)
