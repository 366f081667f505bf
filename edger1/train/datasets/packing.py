"""Documents in batches: several in a row, whole, or one a row among others of its length.

Packing is best fit over a shuffled epoch, as in pretraining; attention stays within each document by its number.
Without packing, documents are shuffled, sorted by length within a window of some batches, and batches are shuffled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edger1.errors import UsageError
from edger1.train.best_fit import pack as best_fit
from edger1.train.datasets.template import Encoded
from edger1.train.finetune.method import Batch

_WINDOW = 32
_WIDTH = 32


class Batches:
    """The batches of all epochs, in order: batch i depends on the documents, the seed and i, and on nothing else.

    A batch has at most `rows` rows, is as wide as its longest row needs (a multiple of 32), and no wider than `length`.
    Its weights are 1 where a token is learned, not yet divided by anything. `shuffle` False keeps the documents' order,
    for evaluation.
    """

    def __init__(
        self,
        documents: Sequence[Encoded],
        length: int,
        rows: int,
        seed: int,
        *,
        pad: int = 0,
        packed: bool = True,
        shuffle: bool = True,
    ) -> None:
        longest = max((document for document in documents), key=len, default=None)
        if longest is None:
            raise UsageError("There are no documents to make batches of.")
        if len(longest) > length:
            raise UsageError(f"{longest.where} has {len(longest):,} tokens; a row has {length:,}.")
        if rows < 1:
            raise UsageError(f"A batch has {rows} rows; expected 1 or more.")
        self.documents = documents
        self.length, self.rows, self.seed, self.pad = length, rows, seed, pad
        self.packed, self.shuffle = packed, shuffle
        self._sizes = np.fromiter((len(document) for document in documents), np.int64, len(documents))
        self._epoch = -1
        self._batches: list[list[list[int]]] = []
        self._starts = [0]

    def epoch_batches(self, epoch: int) -> int:
        """Return how many batches an epoch has."""
        return len(self._of(epoch))

    def place(self, index: int) -> tuple[int, int]:
        """Return the epoch of batch `index` (from 0, over all epochs), and its number within."""
        while self._starts[-1] <= index:
            self._starts.append(self._starts[-1] + self.epoch_batches(len(self._starts) - 1))
        epoch = int(np.searchsorted(self._starts, index, side="right")) - 1
        return epoch, index - self._starts[epoch]

    def at(self, index: int) -> Batch:
        """Return batch `index` (from 0, over all epochs)."""
        epoch, number = self.place(index)
        return self._batch(self._of(epoch)[number])

    def epoch(self, epoch: int) -> list[Batch]:
        """Return all batches of an epoch."""
        return [self._batch(rows) for rows in self._of(epoch)]

    def _of(self, epoch: int) -> list[list[list[int]]]:
        """Return an epoch's batches as rows of indices of documents."""
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            count = len(self._sizes)
            order = generator.permutation(count) if self.shuffle else np.arange(count)
            self._batches = self._packed(order, generator) if self.packed else self._by_length(order, generator)
            self._epoch = epoch
        return self._batches

    def _packed(self, order: np.ndarray, generator: np.random.Generator) -> list[list[list[int]]]:
        rows = best_fit(self._sizes, self.length, order)
        if self.shuffle:
            # Rows that were opened first hold the longest documents.
            rows = [rows[i] for i in generator.permutation(len(rows))]
        return [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]

    def _by_length(self, order: np.ndarray, generator: np.random.Generator) -> list[list[list[int]]]:
        if not self.shuffle:
            return [[[int(i)] for i in order[b : b + self.rows]] for b in range(0, len(order), self.rows)]
        batches: list[list[list[int]]] = []
        for begin in range(0, len(order), self.rows * _WINDOW):
            window = order[begin : begin + self.rows * _WINDOW]
            window = window[np.argsort(self._sizes[window], kind="stable")]
            batches += [[[int(i)] for i in window[b : b + self.rows]] for b in range(0, len(window), self.rows)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def _batch(self, rows: list[list[int]]) -> Batch:
        used = max(int(self._sizes[row].sum()) for row in rows)
        width = min(self.length, -(-used // _WIDTH) * _WIDTH)
        ids = np.full((len(rows), width), self.pad, np.int32)
        documents = np.full((len(rows), width), -1, np.int32)
        weights = np.zeros((len(rows), width), np.float32)
        for r, row in enumerate(rows):
            at = 0
            for number, i in enumerate(row):
                document = self.documents[i]
                end = at + len(document)
                ids[r, at:end] = document.ids
                documents[r, at:end] = number
                # The first token has nothing before it to be predicted from.
                weights[r, at + 1 : end] = document.counted[1:]
                at = end
        return Batch(ids, documents, weights)


def pack(documents: Sequence[Encoded], length: int, rows: int, seed: int, epoch: int, *, pad: int = 0) -> list[Batch]:
    """Return an epoch's batches of packed rows."""
    return Batches(documents, length, rows, seed, pad=pad).epoch(epoch)
