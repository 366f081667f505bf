"""How far one model's next-token distributions are from another's, from their logits a slice of the vocabulary a time.

For each position: the Kullback-Leibler divergence of the model q from the source p, sum p (log p - log q), in nats; the
negative log-likelihood of the token that came, under both; and whether both think the same token likeliest. Logits are
taken once, in the order of the vocabulary, with running maxima as in an online softmax (Milakov and Gimelshein, 2018),
so that nothing of the vocabulary's size is kept and the result does not depend on the slices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edger1.errors import UsageError

Floats = npt.NDArray[np.float64]

SLICE = 8192
"""Entries of the vocabulary that `compare` takes at a time."""

_LEAST = np.float32(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Compared:
    """What was found at each of some positions.

    `divergence`, `source_loss` and `model_loss` are float64 [positions] in nats, `agrees` is bool [positions].
    """

    divergence: Floats
    source_loss: Floats
    model_loss: Floats
    agrees: npt.NDArray[np.bool_]


class _Side:
    """One model's distributions so far: log of the sum of exponentials, the target's logit, the likeliest token."""

    def __init__(self, targets: npt.NDArray[np.integer]) -> None:
        self._targets = targets
        self.top = np.full(len(targets), _LEAST, np.float32)
        self.total = np.zeros(len(targets))
        self.best = np.zeros(len(targets), np.int64)
        self._target = np.full(len(targets), -np.inf)

    def add(self, logits: npt.NDArray[np.float32], first: int) -> tuple[npt.NDArray[np.float32], Floats]:
        """Take logits [positions, slice] from vocabulary entry `first` on.

        Returns exp(logits - top), and what sums that were made before are to be multiplied by.
        """
        rows = np.arange(len(logits))
        likeliest = logits.argmax(axis=1)
        highest = logits[rows, likeliest]
        higher = highest > self.top
        self.best[higher] = first + likeliest[higher]
        before, self.top = self.top, np.maximum(self.top, highest)
        exponentials = np.exp(logits - self.top[:, None])
        shrink = np.exp(before.astype(np.float64) - self.top)
        self.total = self.total * shrink + exponentials.sum(axis=1, dtype=np.float64)
        inside = (self._targets >= first) & (self._targets < first + logits.shape[1])
        self._target[inside] = logits[rows[inside], self._targets[inside] - first]
        return exponentials, shrink

    def normaliser(self) -> Floats:
        """Return the logarithm of the sum of exponentials of all logits."""
        return np.asarray(self.top + np.log(self.total), np.float64)

    def loss(self) -> Floats:
        """Return the negative log-likelihood of the targets."""
        return self.normaliser() - self._target


class Divergence:
    """Takes both models' logits of some positions, slice after slice. `targets` are the tokens that came there."""

    def __init__(self, targets: npt.NDArray[np.integer]) -> None:
        self._source, self._model = _Side(targets), _Side(targets)
        # The sum of exp(a - top) (a - b) over the source's logits a and the model's b.
        self._weighed = np.zeros(len(targets))
        self._next = 0

    def add(self, source: npt.NDArray[np.float32], model: npt.NDArray[np.float32]) -> None:
        """Take f32 [positions, slice] of both, the slice that follows those given before."""
        exponentials, shrink = self._source.add(source, self._next)
        self._model.add(model, self._next)
        self._next += source.shape[1]
        # What the source gives no chance counts nothing, be its logit minus infinity on either side.
        products = np.zeros(source.shape)
        with np.errstate(invalid="ignore"):
            apart = source.astype(np.float64) - model
        np.multiply(exponentials, apart, out=products, where=exponentials > 0)
        self._weighed = self._weighed * shrink + products.sum(axis=1)

    def result(self) -> Compared:
        """Return what was found; all of the vocabulary has been given."""
        source, model = self._source, self._model
        divergence = self._weighed / source.total - source.normaliser() + model.normaliser()
        # Below zero is only what rounding makes of nothing.
        return Compared(np.maximum(divergence, 0.0), source.loss(), model.loss(), source.best == model.best)


def compare(
    source: npt.NDArray[np.float32], model: npt.NDArray[np.float32], targets: npt.NDArray[np.integer]
) -> Compared:
    """Compare f32 logits [positions, vocabulary] of two models, whose next tokens were `targets` [positions].

    Raises UsageError where the vocabularies differ in size.
    """
    if source.shape != model.shape:
        raise UsageError(
            f"The source has {source.shape[-1]} logits a token and the model {model.shape[-1]}, so their distributions "
            f"cannot be compared; measure a model against the one that it was made from."
        )
    found = Divergence(targets)
    for first in range(0, source.shape[1], SLICE):
        found.add(source[:, first : first + SLICE], model[:, first : first + SLICE])
    return found.result()
