"""What samples say of a model: accuracy, pass@k and maj@k, with intervals, and differences between models.

Every figure is a mean over questions; intervals are at 95% and of the questions, as if they were drawn from many alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random

import numpy as np

LEVEL = 0.95
_Z = 1.959963984540054
_RESAMPLES = 4000
_MOST_SUBSETS = 500
_SEED = 20240131


@dataclass(frozen=True)
class Estimate:
    """A share of questions, and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """How much better one model is than another on the same questions."""

    value: float
    low: float
    high: float
    better: int
    """Questions that it has right more often than the other."""
    worse: int
    p: float
    """Of a difference as large or larger where none is: McNemar's exact test over the questions that differ."""


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that at least one of k samples is right, of n samples c of which are right.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples with {c} right")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def maj_at_k(keys: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return the chance that the answer given most often among k samples is right.

    `keys` say which samples gave the same answer; those that gave none (None) do not vote. Answers that are ahead
    together share the chance. The mean over all choices of k of the samples, or over 500 drawn ones where there are
    more (self-consistency, arXiv:2203.11171).
    """
    n = len(keys)
    if not 1 <= k <= n:
        raise ValueError(f"maj@{k} of {n} samples")
    if math.comb(n, k) <= _MOST_SUBSETS:
        subsets = list(combinations(range(n), k))
    else:
        random = Random(_SEED)
        subsets = [tuple(random.sample(range(n), k)) for _ in range(_MOST_SUBSETS)]
    return sum(_vote([keys[i] for i in chosen], [right[i] for i in chosen]) for chosen in subsets) / len(subsets)


def _vote(keys: Sequence[str | None], right: Sequence[bool]) -> float:
    votes: dict[str, list[bool]] = {}
    for key, good in zip(keys, right, strict=True):
        if key is not None:
            votes.setdefault(key, []).append(good)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    leading = [sum(goods) / len(goods) for goods in votes.values() if len(goods) == most]
    return sum(leading) / len(leading)


def wilson(right: int, total: int) -> Estimate:
    """Return a share and Wilson's score interval of it (1927)."""
    share = right / total
    middle = (share + _Z**2 / (2 * total)) / (1 + _Z**2 / total)
    half = _Z / (1 + _Z**2 / total) * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    # Where all or none are right a bound is the share itself, but for rounding.
    return Estimate(share, max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half)))


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean over questions and its interval.

    Wilson's where every value is 0 or 1; otherwise the bootstrap's over questions (percentiles, a fixed seed).
    """
    if all(value in (0.0, 1.0) for value in values):
        return wilson(round(sum(values)), len(values))
    low, high = _bootstrap(np.asarray(values, np.float64))
    return Estimate(float(np.mean(values)), low, high)


def difference(of: Sequence[float], against: Sequence[float]) -> Difference:
    """Compare two models on the same questions, by each question's share of right samples.

    The interval is the bootstrap's over questions, both models' values of a question drawn together.
    """
    deltas = np.asarray(of, np.float64) - np.asarray(against, np.float64)
    better, worse = int((deltas > 0).sum()), int((deltas < 0).sum())
    low, high = _bootstrap(deltas)
    return Difference(float(deltas.mean()), low, high, better, worse, mcnemar(better, worse))


def mcnemar(better: int, worse: int) -> float:
    """Return the two-sided p of McNemar's exact test: of a fair coin thrown `better + worse` times."""
    total = better + worse
    if total == 0:
        return 1.0
    ways = tail = 1
    for i in range(min(better, worse)):
        ways = ways * (total - i) // (i + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**total)


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    if values.size < 2 or np.all(values == values[0]):
        return float(values.mean()), float(values.mean())
    random = np.random.default_rng(_SEED)
    means = np.empty(_RESAMPLES)
    # In parts: thousands of questions by thousands of resamples would be a large array.
    step = max(1, 2_000_000 // values.size)
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        means[start : start + count] = values[random.integers(0, values.size, (count, values.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
