"""How many MoE layers to compute before their routers' choices are read back together: arithmetic, and a controller.

Synchronising costs s, a layer's work c, and a layer's experts are all there with probability p. Read back in every
layer, a layer costs s + c. A window of W layers is computed with whatever is there and then checked with one read-back.
Up to the first layer j that missed everything was right; layer j is computed again, and what follows it anew, unchecked
until there are W such layers once more or the model ends. Per check in the middle of a long model that is

    s + c W + c (1 - p^W)    for    (1 - p^W) / (1 - p)    layers.

Without the last term, as if the missing layer were not computed twice, W = 5 would be faster by 1.95 at s = 2 ms,
c = 0.44 ms and p = 0.80, and W = 3 by 1.39 at p = 0.57; others give these figures. With it they are 1.82 and 1.26.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_HIT_MEMORY = 64
"""Tokens that the estimate of a layer's full hits looks back on."""
_TIME_MEMORY = 200
"""Read-backs that the estimates of costs look back on."""
_REVIEW = 16
"""Tokens between two choices of a width."""
_TRY_EVERY = 16
"""Of how many tokens one is used to try the width's neighbours, so that both costs stay known."""
_WARM_UP = (1, 3)
_WORTH = 0.97
"""What share of the cost in use another width must fall below to be taken."""


def token_seconds(width: int, full_hits: Sequence[float], sync_s: float, compute_s: float) -> float:
    """Return the expected time of one token through MoE layers that hit fully with these probabilities.

    `width` 1 reads back in every layer, before its experts are computed. Reading experts from disk is not counted: it
    takes the same time at every width.
    """
    p = np.asarray(full_hits, np.float64)
    layers = len(p)
    if width <= 1 or not layers:
        return layers * (sync_s + compute_s)
    width = min(width, layers)
    # [k]: expected time from the check after k layers, with a full window of them unchecked.
    middle = np.zeros(layers + 1)
    # [u]: the same after the last layer, with u of them unchecked.
    end = np.zeros(width + 1)

    def check(k: int, unchecked: int) -> float:
        hits = p[k - unchecked : k]
        reach = np.concatenate(([1.0], np.cumprod(hits)))
        left = np.arange(unchecked - 1, -1, -1)
        onward = np.array([after(k, int(u)) for u in left])
        missed: npt.NDArray[np.float64] = reach[:-1] * (1 - hits) * (compute_s * (1 + left) + onward)
        return float(sync_s + missed.sum() + reach[-1] * after(k, 0))

    def after(k: int, unchecked: int) -> float:
        more = min(width - unchecked, layers - k)
        if k + more < layers:
            return float(compute_s * more + middle[k + more])
        return float(compute_s * more + end[unchecked + more])

    for unchecked in range(1, width + 1):
        end[unchecked] = check(layers, unchecked)
    for k in range(layers - 1, width - 1, -1):
        middle[k] = check(k, width)
    return after(0, 0)


def candidates(layers: int) -> list[int]:
    """Return the widths worth comparing: every small one, fewer of the large ones, and the whole model."""
    widths = {*range(1, 9), *(round(8 * 1.25**i) for i in range(1, 24)), layers}
    return sorted(width for width in widths if 1 <= width <= max(1, layers))


def best_width(full_hits: Sequence[float], sync_s: float, compute_s: float) -> int:
    """Return the width of the least expected time, the smallest of equals."""
    return min(candidates(len(full_hits)), key=lambda width: token_seconds(width, full_hits, sync_s, compute_s))


class Costs:
    """s and c from how long it took to the end of each read-back, and how many layers were computed for it.

    A line through the readings, which count less as they grow old.
    """

    def __init__(self) -> None:
        self._sums = np.zeros(5)

    def add(self, layers: int, seconds: float) -> None:
        """Take note of a read-back that ended `seconds` after the one before, with `layers` layers between them."""
        self._sums *= 1 - 1 / _TIME_MEMORY
        self._sums += (1.0, layers, seconds, layers * layers, layers * seconds)

    @property
    def estimates(self) -> tuple[float, float] | None:
        """s and c in seconds; None as long as no two readings had different numbers of layers."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        if n < 2 or spread <= 1e-6 * n * xx:
            return None
        compute = min(max((n * xy - x * y) / spread, 0.0), y / x)
        return max((y - compute * x) / n, 0.0), compute


class WidthController:
    """Chooses the width for each token, from what the tokens before it showed.

    It begins by reading back in every layer. One token in 16 has a neighbouring width: time at one width alone would
    not tell what of it is waiting and what is work.
    """

    def __init__(self, layers: int) -> None:
        self.costs = Costs()
        self.width = 1
        self._hits = np.zeros(layers)
        self._seen = np.zeros(layers, np.int64)
        self._tokens = 0

    def hit(self, layer: int, full: bool) -> None:
        """Take note of whether all experts that a layer chose for a token were there."""
        self._seen[layer] += 1
        self._hits[layer] += (float(full) - self._hits[layer]) / min(self._seen[layer], _HIT_MEMORY)

    @property
    def full_hits(self) -> npt.NDArray[np.float64]:
        """How often each layer's experts were all there, lately."""
        return self._hits.copy()

    def next(self, layers: Sequence[int], decoder_layers: int) -> int:
        """Return the width for the next token.

        `layers` are the MoE layers that may miss; `decoder_layers` is how many layers the model computes for a token.
        """
        token, self._tokens = self._tokens, self._tokens + 1
        if not layers:
            return 1
        if token < len(_WARM_UP):
            return min(_WARM_UP[token], len(layers))
        if (token - len(_WARM_UP)) % _REVIEW == 0:
            self._review(layers, decoder_layers)
        if token % _TRY_EVERY == _TRY_EVERY - 1:
            step = 1 if self.width == 1 or token // _TRY_EVERY % 2 else -1
            return min(max(self.width + step, 1), len(layers))
        return min(self.width, len(layers))

    def _review(self, layers: Sequence[int], decoder_layers: int) -> None:
        estimates = self.costs.estimates
        if estimates is None:
            return
        sync, compute = estimates[0], estimates[1] * decoder_layers / len(layers)
        hits = self._hits[list(layers)].tolist()
        best = best_width(hits, sync, compute)
        if token_seconds(best, hits, sync, compute) < _WORTH * token_seconds(self.width, hits, sync, compute):
            self.width = best
