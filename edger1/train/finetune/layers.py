"""A model's decoder layers passed one at a time, forwards and backwards, so that one layer's activations exist at once.

Forwards, only what each layer is given is kept: [rows, length, D] a layer. Backwards, a layer is computed again and
differentiated, and what that took is freed before the layer below begins. Evaluation follows the layers and not MLX's
order of the whole graph, which would be free to hold several layers' activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from edger1.train.finetune.rows import Rows, attending
from edger1.train.finetune.structure import Structure, same


class Weights:
    """The weights that are trained, where they lie in the model."""

    def __init__(self, model: Any, weights: dict[str, mx.array], structure: Structure | None) -> None:
        """Take them by their names, which are paths in the model."""
        modules = dict(model.named_modules())
        self.names = sorted(weights)
        self._places = []
        for name in self.names:
            path, _, key = name.rpartition(".")
            self._places.append((modules[path], key))
        prefix = None if structure is None else f"{structure.path}.layers."
        self.layer_of = [
            int(name[len(prefix) :].split(".", 1)[0]) if prefix is not None and name.startswith(prefix) else -1
            for name in self.names
        ]
        """The layer that each lies in, by number; -1 outside of layers."""
        self.beyond_layers = any(layer < 0 for layer in self.layer_of)
        inside = None if structure is None else structure.path + "."
        self.in_head = inside is None or any(
            layer < 0 and (not name.startswith(inside) or "embed" in name)
            for name, layer in zip(self.names, self.layer_of, strict=True)
        )
        """Whether some lie in what makes logits of hidden states, or may."""
        self._traced: list[mx.array] = []

    @property
    def lowest(self) -> int:
        """The first layer that has one."""
        return min(self.layer_of, default=0)

    def current(self) -> dict[str, mx.array]:
        """Return them by name."""
        return {name: module[key] for name, (module, key) in zip(self.names, self._places, strict=True)}

    def assign(self, weights: dict[str, mx.array]) -> None:
        """Set those that are named."""
        for name, (module, key) in zip(self.names, self._places, strict=True):
            if name in weights:
                module[key] = weights[name]

    def trace(self, weights: list[mx.array], *, put: bool) -> None:
        """Note what stands for the weights while they are differentiated, and `put` it into their places."""
        self._traced = weights
        if put:
            self.restore(weights)

    def restore(self, weights: list[mx.array]) -> None:
        """Set all of them, in the order of `names`."""
        for (module, key), value in zip(self._places, weights, strict=True):
            module[key] = value

    @property
    def traced(self) -> list[mx.array]:
        """What stands for the weights, in the order of `names`."""
        return self._traced

    def of_layer(self, layer: int) -> list[int]:
        """Return the places, in `names`, of a layer's weights."""
        return [i for i, own in enumerate(self.layer_of) if own == layer]

    def put(self, places: list[int], values: list[mx.array]) -> None:
        """Set some of them, by their places in `names`."""
        for i, value in zip(places, values, strict=True):
            module, key = self._places[i]
            module[key] = value


Call = Callable[[int, Any, tuple[Any, ...], dict[str, Any]], Any]
"""What happens where layer number i, a module, is called with arguments."""


class _Stub:
    """Stands in for a layer in its trunk's list."""

    def __init__(self, number: int, layer: Any, call: Call) -> None:
        self._number, self._layer, self._call = number, layer, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._number, self._layer, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def __contains__(self, key: str) -> bool:
        return key in self._layer

    def __getitem__(self, key: str) -> Any:
        return self._layer[key]


@contextmanager
def _called_by(structure: Structure, call: Call) -> Iterator[None]:
    before = structure.trunk["layers"]
    stubs = [_Stub(i, layer, call) for i, layer in enumerate(before)]
    dict.__setitem__(structure.trunk, "layers", stubs)
    try:
        yield
    finally:
        dict.__setitem__(structure.trunk, "layers", before)


def packs(model: Any, structure: Structure | None) -> bool:
    """Whether packed rows give each document what it has alone: plain KV caches, and tried on a few tokens."""
    try:
        caches = make_prompt_cache(model)
        if any(type(one) not in (KVCache, RotatingKVCache) for one in caches):
            return False
        call = model if structure is None else structure.hidden
        # Two rows, split differently: a few families apply the mask of one row to another.
        ids = mx.arange(3, 27, dtype=mx.int32).reshape(2, 12)
        splits = (5, 8)
        rows = Rows(np.stack([(np.arange(12) >= split).astype(np.int32) for split in splits]))
        with attending(rows):
            packed = call(ids, [rows] * len(caches))
        return all(
            same(call(ids[r : r + 1, a:b], None)[0], packed[r, a:b])
            for r, split in enumerate(splits)
            for a, b in ((0, split), (split, 12))
        )
    except Exception:
        # A model that cannot be called so fails in any way.
        return False


def chained(structure: Structure | None, packed: bool) -> bool:
    """Whether each layer is given what the one before it answered, and nothing else that changes with the input."""
    if structure is None:
        return False
    passed: list[Any] = []
    chain = True

    def call(number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal chain
        out = layer(*args, **kwargs)
        chain = chain and isinstance(out, mx.array) and bool(args) and (number == 0 or args[0] is passed[-1])
        passed.append(out)
        return out

    ids = mx.arange(3, 9, dtype=mx.int32)[None]
    rows = Rows(np.zeros((1, 6), np.int32)) if packed else None
    caches = None if rows is None else [rows] * len(structure.layers)
    try:
        with _called_by(structure, call), attending(rows):
            expected = structure.hidden(ids, caches)
        if not chain or len(passed) != len(structure.layers):
            return False
        return same(expected, _tail(structure, ids, caches, passed[-1]))
    except Exception:
        return False


def _tail(structure: Structure, ids: mx.array, caches: list[Any] | None, last: mx.array) -> mx.array:
    """Return what a trunk makes of the last layer's answer."""
    with _called_by(structure, lambda *_: last):
        return structure.hidden(ids, caches)


class Passes:
    """The passes through the layers that one loss took, to be gone back through once the loss is known.

    That waits until MLX has differentiated the rest: while it does, it frees nothing that it has evaluated.
    """

    def __init__(self, structure: Structure, weights: Weights) -> None:
        self._structure, self._weights = structure, weights
        self._own = list(weights.current().values())
        self._open: list[tuple[_Pass, Rows | None, list[mx.array]]] = []

    def hidden(self, ids: mx.array, caches: list[Any] | None) -> mx.array:
        """Return the states [rows, length, D] before the head, evaluated, to be differentiated."""
        kept = _Pass(self._structure, ids, caches, kept_from=max(0, self._weights.lowest))
        rows = next((one for one in caches or () if isinstance(one, Rows)), None)
        found: list[mx.array] = []
        self._open.append((kept, rows, found))

        @mx.custom_function
        def through(*_: mx.array) -> mx.array:
            return kept.states

        @through.vjp
        def through_vjp(primals: Any, cotangent: mx.array, _: Any) -> tuple[mx.array, ...]:
            found.append(cotangent)
            return tuple(mx.zeros_like(value) for value in primals)

        return cast(Callable[..., mx.array], through)(*self._weights.traced)

    def gradients(self) -> list[mx.array]:
        """Go back through all passes; return the weights' gradients in the order of their names."""
        mx.eval([found for _, _, found in self._open])
        total = [mx.zeros_like(value) for value in self._own]
        while self._open:
            kept, rows, found = self._open.pop()
            for cotangent in found[:1]:
                with attending(rows):
                    own = kept.backwards(cotangent, self._weights, self._own)
                total = [a + b for a, b in zip(total, own, strict=True)]
                mx.eval(total)
        return total


def hidden(structure: Structure, ids: mx.array, caches: list[Any] | None) -> mx.array:
    """Return the states [rows, length, D] before the head, evaluated layer by layer; they have no gradient."""
    return _Pass(structure, ids, caches, kept_from=len(structure.layers)).states


class _Pass:
    """One pass through the layers: what each was given, from layer `kept_from` on, and the trunk's states."""

    def __init__(self, structure: Structure, ids: mx.array, caches: list[Any] | None, kept_from: int) -> None:
        self._structure, self._ids, self._caches, self._kept_from = structure, ids, caches, kept_from
        self._given: dict[int, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}
        # Dropout falls backwards as it did forwards: each layer draws from a seed of its own.
        self._seed = int(mx.random.randint(0, 1 << 30).item())  # type: ignore[arg-type]
        self._last = mx.zeros(())
        with _called_by(structure, self._forward):
            self.states = structure.hidden(ids, caches)
        mx.eval(self.states)

    def _forward(self, number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number >= self._kept_from:
            self._given[number] = layer, args, kwargs
            mx.random.seed(self._seed + number)
        self._last = layer(*args, **kwargs)
        mx.eval(self._last)
        return self._last

    def backwards(self, cotangent: mx.array, weights: Weights, own: list[mx.array]) -> list[mx.array]:
        """Return the gradients of the weights `own`, in their order, for a cotangent of the states."""

        def tail(last: mx.array) -> mx.array:
            return _tail(self._structure, self._ids, self._caches, last)

        _, (at,) = mx.vjp(tail, [self._last], [cotangent])
        mx.eval(at)
        gradients = [mx.zeros((0,))] * len(own)
        for number in sorted(self._given, reverse=True):
            layer, args, kwargs = self._given.pop(number)
            places = weights.of_layer(number)
            mx.random.seed(self._seed + number)

            def again(x: mx.array, *values: mx.array) -> mx.array:
                weights.put(places, list(values))  # noqa: B023
                return layer(x, *args[1:], **kwargs)  # noqa: B023

            mine = [own[i] for i in places]
            if number > self._kept_from:
                _, (at, *found) = mx.vjp(again, [args[0], *mine], [at])
            else:
                # Nothing below is trained.
                _, found = mx.vjp(lambda *v: again(args[0], *v), mine, [at])  # noqa: B023
            mx.eval(at, found)
            weights.put(places, mine)
            for i, gradient in zip(places, found, strict=True):
                gradients[i] = gradient
        return gradients
