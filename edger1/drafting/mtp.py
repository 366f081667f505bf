"""Drafts from a model's own layer for multi-token prediction.

The layer reads, for each position, the model's hidden state there and the token after it, and predicts the token after
that. Whatever passes through the model leaves its hidden states here; the layer catches up on them when drafts are
asked for. Further drafts feed the layer its own states, which it was not trained on: fewer of those stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edger1.architectures.mtp import Base, Predictor
from edger1.drafting.draws import Draws
from edger1.drafting.passes import Snapshot
from edger1.drafting.rejection import Probabilities

if TYPE_CHECKING:
    from edger1.experts.streaming import Streaming
    from edger1.kernels.install import Installed

_FEW = 16
_MOST_WAITING = 512
"""Positions whose hidden states are kept before the layer catches up on them."""


@dataclass
class Ahead:
    """A loaded MTP layer beside its model."""

    predictor: Predictor
    base: Base
    installed: Installed
    nbytes: int
    streaming: Streaming | None = None

    def forward(self, tokens: Any, caches: list[Any]) -> tuple[Any, Any]:
        """Pass tokens [1, L] through the model; returns hidden states [1, L, D] and logits [1, L, V]."""
        hidden = self.base.inner(tokens, cache=caches)
        return hidden, self.base.head(hidden)

    def close(self) -> None:
        """Give the memory and the kernels back."""
        self.installed.uninstall()
        if self.streaming is not None:
            self.streaming.close()
            self.streaming = None


@dataclass
class Kept:
    """What an MTP layer knows of a text, kept with the model's own caches, whose interface it has as far as needed.

    `cache` has read the positions before `first`, `hidden` [1, r, D] are the states of those that follow.
    """

    cache: Any
    hidden: Any
    first: int

    @property
    def end(self) -> int:
        """The number of positions that it is about."""
        return self.first + (0 if self.hidden is None else int(self.hidden.shape[1]))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return int(self.cache.nbytes) + (0 if self.hidden is None else int(self.hidden.nbytes))

    @property
    def state(self) -> list[Any]:
        """Its arrays."""
        return [self.cache.state, *([] if self.hidden is None else [self.hidden])]

    def is_trimmable(self) -> bool:
        """Whether it can forget the last positions."""
        return bool(self.cache.is_trimmable())

    def trim(self, count: int) -> int:
        """Forget the last `count` positions.

        The one before them was read with the token that followed; another one may follow now, which costs a draft.
        """
        end = self.end - count
        if end > self.first:
            self.hidden = self.hidden[:, : end - self.first]
        elif count:
            self.hidden = None
            self.cache.trim(self.first - end)
            self.first = end
        return count


class MTPDrafter:
    """The MTP layer of one answer: its KV cache, and hidden states that it has yet to read."""

    name = "mtp"

    def __init__(self, ahead: Ahead) -> None:
        self._ahead = ahead
        self._cache: Any = None
        # Hidden states [1, r, D] of positions _first, _first + 1, ... that the layer has not read, piece by piece:
        # nobody may ever ask for them.
        self._pieces: list[Any] = []
        self._waiting = 0
        self._first = 0
        # Drafts that were begun, and the length of the text that they follow.
        self._begun: tuple[int, Any, Probabilities | None] | None = None

    def begin(self, kept: Kept | None = None) -> None:
        """Begin with what an earlier request with the same tokens has left, or with nothing."""
        from mlx_lm.models.cache import KVCache

        kept = kept or Kept(KVCache(), None, 0)
        self._cache, self._hidden, self._first = kept.cache, kept.hidden, kept.first
        self._begun = None

    @property
    def _hidden(self) -> Any:
        import mlx.core as mx

        if len(self._pieces) > 1:
            self._pieces = [mx.concatenate(self._pieces, axis=1)]
        return self._pieces[0] if self._pieces else None

    @_hidden.setter
    def _hidden(self, hidden: Any) -> None:
        self._pieces = [] if hidden is None else [hidden]
        self._waiting = 0 if hidden is None else int(hidden.shape[1])

    def leave(self, positions: int) -> Kept | None:
        """Give up what it knows of a text of `positions` tokens; None where that is not about all of them."""
        import mlx.core as mx

        if self._cache is None:
            return None
        kept = Kept(self._cache, self._hidden, self._first)
        self._cache = self._hidden = self._begun = None
        if kept.end > positions:
            kept.trim(kept.end - positions)
        if kept.end != positions or kept.cache.offset == 0:
            return None
        if kept.hidden is not None:
            kept.hidden = mx.contiguous(kept.hidden)
            mx.eval(kept.hidden)
        return kept

    def behind(self, known: Sequence[int]) -> int:
        """How many positions it would have to read before it drafts."""
        return self.waiting

    def observe(self, hidden: Any, first: int, known: Sequence[int]) -> None:
        """Take the hidden states of positions from `first` on, of the tokens `known`."""
        import mlx.core as mx

        if self._cache is None:
            self.begin()
        if self._pieces and self._first + self.waiting == first:
            self._pieces.append(hidden)
            self._waiting += int(hidden.shape[1])
        else:
            self._hidden, self._first = hidden, first
        if hidden.shape[1] > _FEW:
            # A chunk of a prompt: nobody reads its logits, and with them the states would never be computed.
            mx.eval(hidden)
            self._catch_up(known)
        elif self.waiting >= _MOST_WAITING:
            self._catch_up(known)

    def keep(self, positions: int) -> None:
        """Forget hidden states of positions from `positions` on: what was there is not said."""
        count = positions - self._first
        if not self._pieces or count == self.waiting:
            return
        self._hidden = self._hidden[:, :count] if count > 0 else None

    def back(self, positions: int) -> None:
        """Forget positions from `positions` on, and what was drafted from there: the text has changed."""
        self._begun = None
        if positions >= self._first:
            self.keep(positions)
        else:
            self.begin(self.leave(positions))

    def ready(self, known: Sequence[int]) -> bool:
        """Whether it has the hidden state before the last of `known`, or has drafted from it."""
        if self._begun is not None and self._begun[0] == len(known):
            return True
        return bool(self._pieces) and self._first + self.waiting == len(known) - 1

    def draft(self, known: Sequence[int], count: int, draws: Draws) -> tuple[Any, Probabilities | None]:
        """Return `count` drafts of what follows `known` (uint32, [count]), unread, and their distributions.

        They are fewer where fewer were begun.
        """
        begun, self._begun = self._begun, None
        if begun is not None and begun[0] == len(known):
            return begun[1][:count], begun[2]
        return self._draft(self._following(known), known, count, draws)

    def draft_ahead(self, tokens: Any, length: int, count: int, draws: Draws) -> Any:
        """Begin `count` drafts of what follows a text of `length` tokens, which may not be read yet; returns them.

        `tokens` (uint32, [r]) are those after the positions whose hidden states wait, up to the text's last. Only for
        `draws` that are lazy.
        """
        drafts, q = self._draft(tokens[None], (), count, draws)
        self._begun = (length, drafts, q)
        return drafts

    @property
    def waiting(self) -> int:
        """How many hidden states it has yet to read."""
        return self._waiting

    def state(self) -> Callable[[], None]:
        """Return a function that makes all as it is now."""
        caches, hidden, first, begun = Snapshot([self._cache]), self._hidden, self._first, self._begun

        def put_back() -> None:
            caches.put_back()
            self._hidden, self._first, self._begun = hidden, first, begun

        return put_back

    def _draft(
        self, following: Any, known: Sequence[int], count: int, draws: Draws
    ) -> tuple[Any, Probabilities | None]:
        import mlx.core as mx
        import numpy as np

        states = self._read(following)[:, -1:]
        tokens: list[Any] = []
        distributions: list[Any] = []
        said = list(known[-64:])
        for place in range(count):
            if place:
                states = self._ahead.predictor(states, self._ahead.base.embed(tokens[-1][None]), self._cache)
            token, q = draws.draft(self._ahead.base.head(states)[:, -1], place, said)
            tokens.append(token)
            if not draws.lazy:
                said.append(int(token.item()))
            if q is not None:
                distributions.append(q)
        self._cache.trim(count - 1)
        return mx.concatenate(tokens), np.stack(distributions) if distributions else None

    def _following(self, known: Sequence[int]) -> Any:
        """Return the tokens [1, r] after the positions whose hidden states wait."""
        import mlx.core as mx

        return mx.array([known[self._first + 1 : self._first + 1 + self.waiting]])

    def _read(self, tokens: Any) -> Any:
        count = self.waiting
        states = self._ahead.predictor(self._hidden, self._ahead.base.embed(tokens), self._cache)
        self._hidden, self._first = None, self._first + count
        return states

    def _catch_up(self, known: Sequence[int]) -> None:
        """Read all hidden states but those whose next token is not known."""
        import mlx.core as mx

        hidden, count = self._hidden, min(self._hidden.shape[1], len(known) - 1 - self._first)
        if count < 1:
            return
        rest = hidden[:, count:]
        self._hidden = hidden[:, :count]
        mx.eval(self._read(self._following(known)), self._cache.state)
        if rest.shape[1]:
            self._hidden = mx.contiguous(rest)
