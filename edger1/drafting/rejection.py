"""Which drafted tokens stand: speculative sampling, which leaves the model's distribution exactly as it is.

A draft x, drawn from q, stands with probability min(1, p(x) / q(x)), where p is the model's own distribution at that
place. After the first that does not stand, one token is drawn from what q had too little of, max(0, p - q) normalised;
after drafts that all stand, one from the model's distribution behind them. Every token that comes out is distributed as
p says, whatever q is (Leviathan et al., arXiv 2211.17192, theorem 1 of appendix A.1; Chen et al., arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Probabilities = npt.NDArray[np.float64]


def accept(drafts: Sequence[int], p: Probabilities, q: Probabilities, random: np.random.Generator) -> tuple[int, int]:
    """Return how many of `drafts` stand, and the token that follows those.

    p [drafts + 1, vocabulary] is the model's distribution at each draft's place and behind the last; q [drafts,
    vocabulary] is what each draft was drawn from, with q[i, drafts[i]] > 0. Rows add up to 1.
    """
    for i, token in enumerate(drafts):
        if random.random() * q[i, token] < p[i, token]:
            continue
        return i, draw(np.maximum(p[i] - q[i], 0.0), random)
    return len(drafts), draw(p[len(drafts)], random)


def draw(weights: Probabilities, random: np.random.Generator) -> int:
    """Draw an index with probabilities in proportion to `weights`, of which one at least is positive."""
    ends = np.cumsum(weights)
    # Never past the last positive weight, which rounding of the sum could reach.
    found = int(np.searchsorted(ends, random.random() * ends[-1], side="right"))
    return min(found, int(np.flatnonzero(weights)[-1]))
