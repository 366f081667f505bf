"""Where in a model its decoder layers and its head lie, found by structure and trying, not by the family's name.

mlx-lm's models are a module that embeds tokens, passes them through a list of layers and normalises the result (the
trunk), and one around it that turns hidden states into logits: by a head or the embedding, scaled or soft-capped as the
family has it. The outer module with the trunk exchanged for given hidden states is the head, whatever it does there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

_SAME = 1e-4
"""Largest difference, relative to the largest number, that the rounding of another order of sums explains."""


class _Given:
    """Stands in for a trunk: answers with hidden states, and is the trunk in all else."""

    def __init__(self, trunk: nn.Module, hidden: mx.array) -> None:
        self._trunk, self._hidden = trunk, hidden

    def __call__(self, *_: Any, **__: Any) -> mx.array:
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trunk, name)


@dataclass(frozen=True)
class Structure:
    """A model's parts. `layers` lie in `trunk`, and `outer` holds the trunk under the name `key`."""

    outer: nn.Module
    key: str
    trunk: nn.Module
    path: str
    """Where the trunk lies in the model: the beginning of its parameters' names."""

    @property
    def layers(self) -> list[Any]:
        """The decoder layers, in order."""
        return list(self.trunk["layers"])

    def hidden(self, ids: mx.array, caches: list[Any] | None) -> mx.array:
        """Return the states [rows, length, D] that the head makes logits of, for int32 ids [rows, length]."""
        return self.trunk(ids) if caches is None else self.trunk(ids, cache=caches)

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits [N, V] of states [N, D]."""
        with _exchanged(self.outer, self.key, _Given(self.trunk, hidden[None])):
            return self.outer(mx.zeros((1, hidden.shape[0]), dtype=mx.int32))[0]


@contextmanager
def _exchanged(module: nn.Module, key: str, value: Any) -> Iterator[None]:
    before = module[key]
    dict.__setitem__(module, key, value)
    try:
        yield
    finally:
        dict.__setitem__(module, key, before)


def find(model: nn.Module) -> Structure | None:
    """Return a model's structure, or None where it has another one.

    Found by trying it on a few tokens: trunk and head one after the other give the logits of the model itself.
    """
    layers = getattr(model, "layers", None)
    if not layers:
        return None
    modules = dict(model.named_modules())
    for path, trunk in modules.items():
        inside = trunk.get("layers") if isinstance(trunk, dict) else None
        if not path or not isinstance(inside, list) or len(inside) != len(layers) or inside[0] is not layers[0]:
            continue
        above, _, key = path.rpartition(".")
        outer = modules[above]
        if key not in outer:
            continue
        found = Structure(outer, key, trunk, path)
        return found if _holds(model, found) else None
    return None


def _holds(model: nn.Module, found: Structure) -> bool:
    ids = mx.arange(6, dtype=mx.int32)[None]
    try:
        expected = model(ids)[0]
        return same(expected, found.logits(found.hidden(ids, None)[0]))
    except Exception:
        # A module of another kind may fail in any way when it is called like this.
        return False


def same(a: mx.array, b: mx.array) -> bool:
    """Whether two results differ by rounding alone."""
    if a.shape != b.shape:
        return False
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    worst, largest = mx.abs(a - b).max().item(), mx.abs(a).max().item()
    return bool(worst <= _SAME * largest)  # type: ignore[operator]
