"""Several requests of a model decoded together: their KV caches side by side, padded to the longest.

The weights are read once for all rows. mlx-lm's batched caches hold the rows; joining and leaving copies them, a layer
at a time, so that no second copy of all is ever there, and a token copies nothing. Rows of the kernels do not depend on
each other: what a request is answered has the same bits as alone.

All rows are drawn in one operation, and with small models the batch is one step ahead, as a request alone is: the next
step's graph is built and started before the tokens that it begins with are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from edger1.cache import Holder
from edger1.sampling import Draw, kernels

if TYPE_CHECKING:
    from edger1.loader import LiveModel

MOST_ROWS = 16
"""Rows up to which the kernels give each row the bits that it has alone."""


def batchable(model: LiveModel, caches: Sequence[Any]) -> bool:
    """Whether requests with such caches can be decoded together, and have the same bits as alone."""
    from mlx_lm.models.cache import KVCache

    from edger1.packed_cache import QuantizedCache

    kinds = {type(cache) for cache in caches}
    return model.installed.stacked and model.adapter is None and kinds in ({KVCache}, {QuantizedCache})


class Row(Holder, Protocol):
    """A request as the batch sees it; `edger1.generate.Generation` is one."""

    batch: Batch[Any] | None

    @property
    def tokens_fed(self) -> int:
        """How many tokens are in its caches."""

    @property
    def last_token(self) -> int:
        """The token that is fed next."""

    @property
    def ends_next(self) -> bool:
        """Whether its next token is the last that it may say."""

    def lend(self, batch: Batch[Any]) -> tuple[list[Any], Any]:
        """Hand over the caches, and the token drawn ahead, shape (1,), or None."""

    def receive(self, caches: list[Any] | None, drawn: Any) -> None:
        """Take back what was lent."""

    def draw(self, *, unread: bool) -> Draw:
        """Return how its next token is drawn."""

    def feed(self) -> None:
        """Note that `last_token` is in its cache."""


R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Said(Generic[R]):
    """A token that a row has drawn; `fed` where it is in the row's cache already."""

    row: R
    token: int
    fed: bool


class Batch(Generic[R]):
    """The requests of one model that are decoded together."""

    def __init__(self, model: LiveModel, *, ahead: bool) -> None:
        self._model = model
        self._ahead = ahead
        self._rows: list[R] = []
        # A BatchKVCache a layer; nothing where there are no rows.
        self._caches: list[Any] = []
        # What each row is fed next (uint32, [rows]), and the rows that have not been told yet what that is.
        self._next: Any = None
        self._unread: set[R] = set()

    def choose(self, candidates: Sequence[R]) -> list[R]:
        """Return who of `candidates` is to be decoded together, within the memory for caches; they have their room.

        All of them must join; nobody where fewer than two fit. Those that were in the batch stay before others.
        """
        inside = set(self._rows)
        first = sorted(candidates, key=lambda row: row not in inside)[:MOST_ROWS]
        return self._model.kv.hold_together({row: row.tokens_fed + 1 for row in first}) if len(first) > 1 else []

    def step(self, rows: Sequence[R]) -> list[Said[R]]:
        """Go on with `rows` by a token; returns what is to be said now: nothing yet by some that just came in.

        Whoever else was in the batch gets its caches back; without rows nothing more happens.
        """
        import mlx.core as mx

        chosen = set(rows)
        self.give_back([row for row in self._rows if row not in chosen])
        if not rows:
            return []
        self._join([row for row in rows if row.batch is not self])
        unread = [row in self._unread for row in self._rows]
        if all(unread) and all(row.ends_next for row in self._rows):
            self._unread = set()
            return [Said(row, token, False) for row, token in zip(self._rows, self._next.tolist(), strict=True)]
        current = self._next
        logits = self._model.model(current[:, None], cache=self._caches)[:, -1, :].astype(mx.float32)
        draws = [row.draw(unread=later) for row, later in zip(self._rows, unread, strict=True)]
        self._next = kernels().draw_tokens(logits, draws, current if any(unread) else None)
        for row, later in zip(self._rows, unread, strict=True):
            if not later:
                row.feed()
        if not self._ahead:
            return [Said(row, token, False) for row, token in zip(self._rows, self._next.tolist(), strict=True)]
        mx.async_eval(self._next)
        self._unread = set(self._rows)
        tokens = current.tolist() if any(unread) else []
        return [Said(self._rows[i], token, True) for i, token in enumerate(tokens) if unread[i]]

    def give_back(self, rows: Sequence[R]) -> None:
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
        for row, own, drawn in zip(rows, given, self._forget(leaving), strict=True):
            row.receive(own, drawn)

    def remove(self, row: R) -> None:
        """Drop the caches of `row`, if it is in the batch."""
        if row not in self._rows:
            return
        leaving = [self._rows.index(row)]
        for layer in self._caches:
            self._keep_others(layer, leaving)
        row.receive(None, self._forget(leaving)[0])

    def abandon(self) -> None:
        """Drop the caches of all without touching them, after a failure; each feeds its tokens again."""
        rows, self._rows, self._caches, self._next, self._unread = self._rows, [], [], None, set()
        for row in rows:
            row.receive(None, None)

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

    def _forget(self, leaving: list[int]) -> list[Any]:
        """Let go of rows; returns for each the token that it has drawn, shape (1,), None where that is known to it."""
        import mlx.core as mx

        rows, following = self._rows, self._next
        mx.eval(following)
        drawn = [following[i : i + 1] if rows[i] in self._unread else None for i in leaving]
        mx.eval([each for each in drawn if each is not None])
        stay = [i for i in range(len(rows)) if i not in leaving]
        self._rows = [rows[i] for i in stay]
        self._unread &= set(self._rows)
        self._next = following[mx.array(stay)] if stay else None
        if not stay:
            self._caches = []
        return drawn

    def _join(self, rows: list[R]) -> None:
        import mlx.core as mx

        if not rows:
            return
        lent = []
        following = [] if self._next is None else [self._next]
        for row in rows:
            caches, drawn = row.lend(self)
            lent.append(caches)
            following.append(mx.array([row.last_token], mx.uint32) if drawn is None else drawn.astype(mx.uint32))
            if drawn is not None:
                self._unread.add(row)
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
        self._next = mx.concatenate(following)
