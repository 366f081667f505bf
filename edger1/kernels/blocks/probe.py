"""Holds operations against the layers they are to stand for, on random input."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache

from edger1.kernels.blocks import wire
from edger1.kernels.blocks.plan import Plan
from edger1.kernels.blocks.recognise import ACTIVATIONS, Anatomy, Form, UnfitError, build, examine, forms

_SAME = 1e-4
"""Largest difference of the two results, relative to what the layer adds to its input, that rounding explains."""
_CLOSE = 2e-5
"""A difference that no other form would make smaller, but for"""
_ROUNDING = 1e-6
"""the two forms of GELU, which differ by little more than this."""
_FAR = 1_000_003
"""A position at which layers that treat late tokens in another way do so."""
_SLOTS = 8


class Planner:
    """Finds the operation for each layer of a model; a layer is probably like the one before, which is tried first."""

    def __init__(self, precision: str, extension: ModuleType, exact: Mapping[type, type]) -> None:
        self._precision, self._extension, self._exact = precision, extension, exact
        self._last = Form()

    def plan(self, layer: nn.Module) -> Plan:
        """Return the plan that takes in most of `layer`. Raises UnfitError where there is none."""
        anatomy = examine(layer)
        reasons: list[str] = []
        for runs, why_not in (("layer", anatomy.whole), ("attention half", anatomy.half), ("attention", str)):
            found = why_not() or self._try(anatomy, runs)
            if isinstance(found, Plan):
                return replace(found, reason=reasons[0] if reasons else "")
            reasons.append(found)
        raise UnfitError(reasons[-1])

    def _try(self, anatomy: Anatomy, runs: str) -> Plan | str:
        """Return a plan, or why there is none."""
        attempts = forms(anatomy)
        attempts.sort(
            key=lambda f: (f.rotates, f.norms_after_rope) != (self._last.rotates, self._last.norms_after_rope)
        )
        activations = sorted(ACTIVATIONS, key=lambda name: name != self._last.activation)
        if runs == "layer":
            attempts = [replace(form, activation=name) for form in attempts for name in activations]
        best = float("inf"), Form()
        try:
            with _exactly(anatomy, runs, self._exact):
                probe = _Probe(anatomy, runs)
                for form in attempts:
                    call = build(anatomy, form, runs, "exact", self._extension)
                    best = min(best, (probe.difference(call), form), key=lambda t: t[0])
                    if best[0] <= (_CLOSE if form.activation == Form().activation else _ROUNDING):
                        break
            difference, form = best
            if difference > _SAME:
                return f"it computes something else than its parts suggest (off by {difference:.1g})"
            call = build(anatomy, form, runs, self._precision, self._extension)
        except (UnfitError, ValueError) as error:
            return str(error)
        self._last = form if runs == "layer" else replace(form, activation=self._last.activation)
        return Plan(anatomy, runs, call)


class _StandIn(nn.Module):
    """What the probe of a half has for the MLP, which is not its matter and may be large."""

    def __call__(self, x: mx.array) -> mx.array:
        return 0.7 * x


@contextmanager
def _exactly(anatomy: Anatomy, runs: str, exact: Mapping[type, type]) -> Iterator[None]:
    """Let the layer compute without rounding to int8, which makes much of little differences."""
    layer, key = anatomy.layer, anatomy.mlp_key
    mlp = layer[key] if key is not None and runs == "attention half" else None
    if mlp is not None and key is not None:
        layer[key] = _StandIn()
    changed = [(module, type(module)) for module in layer.modules() if type(module) in exact]
    try:
        for module, kind in changed:
            module.__class__ = exact[kind]
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
        if mlp is not None and key is not None:
            layer[key] = mlp


class _Probe:
    """What a layer, or its attention, answers to random input: three rows after five others, and one far away.

    The far one comes into a ring that has turned, so that no layer passes whose rotation or scores change with the
    position in a way that the operation does not know.
    """

    def __init__(self, anatomy: Anatomy, runs: str) -> None:
        self._anatomy, self._runs = anatomy, runs
        module = anatomy.attention if runs == "attention" else anatomy.layer
        hidden = _width(anatomy)
        key = mx.random.key(0)
        self._inputs = [mx.random.normal((1, n, hidden), key=key) for n in (5, 3, 1)]
        self._residual = runs != "attention"
        try:
            self._expected = self._run(module)
            mx.eval(self._expected)
        except Exception as error:
            # What a layer raises when it is called in another way than it expects can be anything.
            raise UnfitError(f"it does not run with a plain cache ({type(error).__name__})") from error

    def _run(self, module: Any) -> list[mx.array]:
        cache = KVCache()
        try:
            self._mask: Any = "causal"
            first = module(self._inputs[0], "causal", cache)
            mx.eval(first, cache.keys, cache.values)
        except Exception:
            # Some want every mask as an array.
            cache = KVCache()
            self._mask = create_causal_mask(3, 5)
            mx.eval(module(self._inputs[0], create_causal_mask(5), cache), cache.keys, cache.values)
        self._keys, self._values = mx.array(cache.keys), mx.array(cache.values)
        near = module(self._inputs[1], self._mask, cache)
        self._ring = [mx.contiguous(a[..., :_SLOTS, :]) for a in (cache.keys, cache.values)]
        far = module(self._inputs[2], None, self._far())
        return [self._added(0, near), self._added(1, far)]

    def _far(self) -> RotatingKVCache:
        cache = RotatingKVCache(max_size=_SLOTS)
        cache.keys, cache.values = (mx.array(a) for a in self._ring)
        cache.offset, cache._idx = _FAR, 3
        return cache

    def _near(self) -> KVCache:
        cache = KVCache()
        cache.keys, cache.values, cache.offset = mx.array(self._keys), mx.array(self._values), 5
        return cache

    def _added(self, step: int, y: Any) -> mx.array:
        if not isinstance(y, mx.array):
            raise TypeError("the result is not one array")
        return y - self._inputs[step + 1] if self._residual else y

    def difference(self, call: Any) -> float:
        """Return how far the operation is from the layer, relative to the largest thing the layer adds."""
        plan, errors = Plan(self._anatomy, self._runs, call), []
        for step, (mask, cache) in enumerate([(self._mask, self._near()), (None, self._far())]):
            out = wire.run(plan, self._inputs[step + 1], mask, cache)
            if out is None:
                return float("inf")
            expected = self._expected[step]
            errors.append(mx.abs(self._added(step, out) - expected).max() / mx.maximum(mx.abs(expected).max(), 1e-30))
        worst = mx.stack(errors).max().tolist()
        # What is no number would pass for small.
        return worst if isinstance(worst, float) and math.isfinite(worst) else float("inf")


def _width(anatomy: Anatomy) -> int:
    for key in ("o_proj", "out_proj", "dense", "wo"):
        projection = anatomy.attention.get(key)
        if isinstance(projection, nn.Module) and isinstance(projection.get("weight"), mx.array):
            return int(projection["weight"].shape[0])
    raise UnfitError("its attention has no output projection")
