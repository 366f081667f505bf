"""Documents packed into rows of one length, whole: best fit over a shuffled epoch.

A document longer than a row is cut into pieces that fill rows of their own; any other stays in one piece, so that
nothing is predicted without its beginning. What is left of a row is padding. An epoch's rows depend on its seed
alone, so a run that goes on needs no more than the epoch and the row it stopped at.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edger1.train.best_fit import pack
from edger1.train.pretrain.corpus import Split
from edger1.train.pretrain.losses import Batch, batch_of


@dataclass(frozen=True)
class Place:
    """Where a run is in its data: the next row of an epoch."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class _Rows:
    """Row r holds pieces first[r] .. first[r + 1], piece p the tokens begin[p] .. begin[p] + size[p]."""

    first: np.ndarray
    begin: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1


class Rows:
    """Batches of packed rows from a split, epoch after epoch; `shuffle` False keeps one fixed order."""

    def __init__(
        self, split: Split, length: int, pad: int, seed: int, *, counted_only: bool, shuffle: bool = True
    ) -> None:
        self.split = split
        self.length = length
        self.pad = pad
        self.seed = seed
        self.counted_only = counted_only
        self.shuffle = shuffle
        self._epoch = -1
        self._rows = _Rows(np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._begin, self._size = _pieces(split.starts, length)

    def epoch_rows(self, epoch: int) -> int:
        """Return how many rows an epoch has."""
        return len(self._of(epoch))

    def next(self, place: Place, count: int) -> tuple[Batch, Place]:
        """Return `count` rows from a place on, over the epoch's end where it comes, and the place after them."""
        tokens = np.full((count, self.length), self.pad, np.int32)
        starts = np.zeros((count, self.length), np.int32)
        counted = np.zeros((count, self.length), bool)
        epoch, row = place.epoch, place.row
        for i in range(count):
            rows = self._of(epoch)
            if row >= len(rows):
                epoch, row = epoch + 1, 0
                rows = self._of(epoch)
            at = 0
            for piece in range(rows.first[row], rows.first[row + 1]):
                begin, size = int(rows.begin[piece]), int(rows.size[piece])
                tokens[i, at : at + size] = self.split.ids[begin : begin + size]
                counted[i, at : at + size] = self.split.counted[begin : begin + size] if self.counted_only else True
                starts[i, at : at + size] = at
                at += size
            starts[i, at:] = at
            row += 1
        return batch_of(tokens, starts, counted), Place(epoch, row)

    def _of(self, epoch: int) -> _Rows:
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            count = len(self._size)
            packed = pack(self._size, self.length, generator.permutation(count) if self.shuffle else np.arange(count))
            # Rows that were opened first hold the longest documents.
            order = generator.permutation(len(packed)) if self.shuffle else np.arange(len(packed))
            first = np.zeros(len(packed) + 1, np.int64)
            np.cumsum([len(packed[r]) for r in order], out=first[1:])
            pieces = np.fromiter((p for r in order for p in packed[r]), np.int64, count)
            self._rows = _Rows(first, self._begin[pieces], self._size[pieces])
            self._epoch = epoch
        return self._rows


def _pieces(starts: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.diff(starts)
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = np.asarray(starts)[:-1][document] + within * length
    return begin, np.minimum(length, sizes[document] - within * length)
