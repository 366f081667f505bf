"""Documents in batches: several in a row, whole, or one a row among others of its length."""

from __future__ import annotations

from edger1.train.datasets.template import Encoded
from edger1.train.finetune.method import Batch


class Batches:
    """The batches of all epochs, in order: batch i depends on the documents, the seed and i, and on nothing else.

    A batch has at most `rows` rows of at most `length` tokens. Its weights are 1 where a token is learned, not yet
    divided by anything.
    """

    def __init__(
        self, documents: list[Encoded], length: int, rows: int, seed: int, *, pad: int = 0, packed: bool = True
    ) -> None:
        raise NotImplementedError

    def epoch_batches(self, epoch: int) -> int:
        """Return how many batches an epoch has."""
        raise NotImplementedError

    def place(self, index: int) -> tuple[int, int]:
        """Return the epoch of batch `index` (from 0, over all epochs), and its number within."""
        raise NotImplementedError

    def at(self, index: int) -> Batch:
        """Return batch `index` (from 0, over all epochs)."""
        raise NotImplementedError


def pack(documents: list[Encoded], length: int, rows: int, seed: int, epoch: int, *, pad: int = 0) -> list[Batch]:
    """Return an epoch's batches of packed rows."""
    raise NotImplementedError
