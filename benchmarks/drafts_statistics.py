"""Whether drafts change what is said: tokens of a model that is a table, counted, against the table itself.

The model's next token depends on the last one only, by a table of logits [V, V], so what it should say is known.
The drafters are those of `edger1.speculate`, on such tables too: a look-up in what was said, a "smaller model" with
another table, and an MTP layer whose states lead to yet another. All of the loop runs as it does for a real model:
drafting, one pass over the drafts, acceptance, rollback.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from edger1.drafting.length import Pace
from edger1.messages import Sampling
from edger1.sampling import RandomState, RandomTurn, Sampler
from edger1.speculate import Speculation

VOCABULARY = 8
SOURCES = ("lookup", "draft", "mtp")


@dataclass(frozen=True)
class Outcome:
    """Chi-square of the tokens that followed each token, its degrees of freedom, and how likely more is by chance."""

    draws: int
    accepted: float
    statistic: float
    freedom: int
    p: float


class _Cache:
    """Holds nothing, and can give it back."""

    offset = 0
    state: tuple[()] = ()

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        return count


class _Table:
    """A model whose logits are a row of a table."""

    def __init__(self, table: Any) -> None:
        self._table = mx.array(table)

    def __call__(self, tokens: Any, cache: Any = None) -> Any:
        return self._table[tokens]

    def make_cache(self) -> list[_Cache]:
        return [_Cache()]


def model(seed: int = 0) -> tuple[Any, npt.NDArray[np.float32]]:
    """Return what stands for a loaded model with both drafting models, and its table of logits."""
    random = np.random.default_rng(seed)
    table, smaller, ahead = (random.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32) * 1.5 for _ in range(3))
    smaller, ahead = table + smaller / 2, table + ahead / 2
    # The head is the table, so a state that leads to a row of `ahead` is that row in the table's terms.
    states = mx.array((ahead.astype(np.float64) @ np.linalg.inv(table.astype(np.float64))).astype(np.float32))
    one_hot, rows = mx.eye(VOCABULARY), mx.array(table)
    base = SimpleNamespace(embed=lambda tokens: one_hot[tokens], head=lambda hidden: hidden @ rows)
    layer = SimpleNamespace(
        predictor=lambda hidden, embedded, cache: embedded @ states,
        base=base,
        forward=lambda tokens, caches: (one_hot[tokens], rows[tokens]),
    )
    drafter = _Table(smaller)
    small = SimpleNamespace(
        model=drafter, context=1 << 30, prefill_step=512, new_caches=drafter.make_cache, vocabulary=VOCABULARY
    )
    live = SimpleNamespace(
        model=_Table(table),
        ahead=layer,
        draft=small,
        pace=Pace(),
        installed=SimpleNamespace(active=True),
        streaming=None,
        streamings=[],
        name="table",
        vocabulary=VOCABULARY,
        no_ahead="",
    )
    return live, table


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Let tokens be drawn by the CPU kernels inside, where there are any."""
    from edger1.kernels import extension, functions

    built = extension()
    if built is None:
        yield
        return
    functions.acquire(built)
    try:
        yield
    finally:
        functions.release()


def said(live: Any, source: str, settings: Sampling, draws: int, seed: int) -> tuple[list[int], float]:
    """Return `draws` tokens said with drafts of one source, and the share of drafts that stood."""
    random, turn = RandomState.seeded(seed), RandomTurn()
    drafts = Speculation(live, source, Sampler(settings, VOCABULARY), random, turn, seeded=False)
    drafts._draws._generator = np.random.default_rng(seed)
    lengths = iter(np.random.default_rng(seed).integers(1, 5, size=draws).tolist())
    for length in drafts._lengths.values():
        # Any number of drafts, whatever they would gain.
        length.choose = lambda acceptance, room: (min(next(lengths), room), 2.0)  # type: ignore[method-assign]
    sampler, caches = Sampler(settings, VOCABULARY), [_Cache()]
    known = [0]
    while len(known) <= draws:
        if drafts.choose(known, caches, 15, unread=False):
            said = drafts.step(known, caches)
            drafts.settle(len(known) + len(said) - 1, caches, len(said))
            drafts.end(len(said), drafted=True)
        else:
            turn.take(random)
            logits = drafts.forward(mx.array([[known[-1]]]), caches, len(known) - 1, known)[:, -1]
            said = [int(sampler(logits, known).item())]
        known += said
    figures = drafts.figures()
    return known, figures["accepted"] / max(1, figures["drafted"])


def compare(live: Any, table: Any, source: str, settings: Sampling, draws: int, seed: int = 1) -> Outcome:
    """Draw with drafts of one source and compare with what the table says at the settings' temperature."""
    known, accepted = said(live, source, settings, draws, seed)
    scores = table.astype(np.float64) / settings.temperature
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (known[:-1], known[1:]), 1)
    expected = counts.sum(-1, keepdims=True) * p
    # Cells that are expected too rarely for the approximation are left out together with their freedom.
    usable = expected >= 5
    statistic = float((((counts - expected) ** 2)[usable] / expected[usable]).sum())
    freedom = int(usable.sum() - (usable.sum(-1) > 0).sum())
    return Outcome(len(known) - 1, accepted, statistic, freedom, chi_square_tail(statistic, freedom))


def chi_square_tail(statistic: float, freedom: int) -> float:
    """Return how likely chi-square with `freedom` degrees exceeds `statistic` (Wilson and Hilferty, 1931)."""
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2))
