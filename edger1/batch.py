"""Several requests of a model decoded together: their KV caches side by side, padded to the longest.

The weights are read once for all rows. mlx-lm's batched caches hold the rows; joining and leaving copies them, a layer
at a time, so that no second copy of all is ever there, and a token copies nothing. Rows of the kernels do not depend on
each other: what a request is answered has the same bits as alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edger1.generate import Generation
    from edger1.loader import LiveModel

MOST_ROWS = 16
"""Rows up to which the kernels give each row the bits that it has alone."""


def batchable(model: LiveModel, caches: Sequence[Any]) -> bool:
    """Whether requests with such caches can be decoded together, and have the same bits as alone."""
    from mlx_lm.models.cache import KVCache

    return model.installed.stacked and all(type(cache) is KVCache for cache in caches)


class Batch:
    """The requests of one model that are decoded together."""

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self._rows: list[Generation] = []
        # A BatchKVCache a layer; nothing where there are no rows.
        self._caches: list[Any] = []

    def choose(self, candidates: Sequence[Generation]) -> list[Generation]:
        """Return who of `candidates` is to be decoded together, within the memory for caches; they have their room.

        All of them must join; nobody where fewer than two fit. Those that were in the batch stay before others.
        """
        first = sorted(candidates, key=lambda row: row not in self._rows)[:MOST_ROWS]
        return self._model.kv.hold_together({row: row.tokens_fed + 1 for row in first}) if len(first) > 1 else []

    def forward(self, rows: Sequence[Generation]) -> Any:
        """Feed each row's last token; returns logits [len(rows), vocabulary] for what follows.

        Whoever else was in the batch gets its caches back; without rows nothing more happens.
        """
        import mlx.core as mx

        self.give_back([row for row in self._rows if row not in rows])
        if not rows:
            return None
        self._join([row for row in rows if row not in self._rows])
        tokens = mx.array([[row.last_token] for row in self._rows])
        logits = self._model.model(tokens, cache=self._caches)[:, -1, :]
        order = [self._rows.index(row) for row in rows]
        logits = logits if order == list(range(len(rows))) else logits[mx.array(order)]
        mx.eval(logits)
        return logits

    def give_back(self, rows: Sequence[Generation]) -> None:
        """Return to `rows` the caches that are theirs; the others stay together."""
        import mlx.core as mx

        if not rows:
            return
        leaving = [self._rows.index(row) for row in rows]
        given: list[list[Any]] = [[] for _ in rows]
        for layer in self._caches:
            each = [layer.extract(i) for i in leaving]
            mx.eval([(cache.keys, cache.values) for cache in each])
            for own, cache in zip(given, each, strict=True):
                own.append(cache)
            self._keep_others(layer, leaving)
        self._forget(rows)
        for row, own in zip(rows, given, strict=True):
            row.receive(own)

    def remove(self, row: Generation) -> None:
        """Drop the caches of `row`, if it is in the batch."""
        if row not in self._rows:
            return
        leaving = [self._rows.index(row)]
        for layer in self._caches:
            self._keep_others(layer, leaving)
        self._forget([row])
        row.receive(None)

    def abandon(self) -> None:
        """Drop the caches of all without touching them, after a failure; each feeds its tokens again."""
        rows, self._rows, self._caches = self._rows, [], []
        for row in rows:
            row.receive(None)

    def _keep_others(self, layer: Any, leaving: list[int]) -> None:
        import mlx.core as mx

        stay = [i for i in range(len(self._rows)) if i not in leaving]
        if not stay:
            layer.keys = layer.values = None
            return
        layer.filter(mx.array(stay))
        # Else the padding that filter has cut off would be kept, beneath what is left.
        layer.keys, layer.values = mx.contiguous(layer.keys), mx.contiguous(layer.values)
        mx.eval(layer.keys, layer.values, layer.offset, layer.left_padding)

    def _forget(self, rows: Sequence[Generation]) -> None:
        self._rows = [row for row in self._rows if row not in rows]
        if not self._rows:
            self._caches = []

    def _join(self, rows: list[Generation]) -> None:
        import mlx.core as mx

        if not rows:
            return
        lent = [row.lend(self) for row in rows]
        merged = []
        for i in range(len(lent[0])):
            layer = type(lent[0][i]).merge([caches[i] for caches in lent])
            if self._caches:
                self._caches[i].extend(layer)
                layer = self._caches[i]
            mx.eval(layer.keys, layer.values, layer.offset, layer.left_padding)
            for caches in lent:
                caches[i] = None
            merged.append(layer)
        self._caches = merged
        self._rows += rows
