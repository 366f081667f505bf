"""Drafts change nothing about what is said: counted over a small vocabulary, for each drafter and temperature.

`python -m benchmarks.drafts --only statistics-mtp-0.6` (or `-draft-1.0`, and so on) does the same with 100,000 draws.
"""

from __future__ import annotations

import itertools

import pytest

from benchmarks import drafts_statistics as statistics
from edger1.messages import Sampling

DRAWS = 2500


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@pytest.mark.parametrize("source", statistics.SOURCES)
def test_tokens_with_drafts_are_distributed_as_without(source: str, temperature: float) -> None:
    live, table = statistics.model()
    with statistics.kernels():
        outcome = statistics.compare(live, table, source, Sampling(temperature=temperature, top_p=1.0), DRAWS)
    assert 0.05 < outcome.accepted < 0.99, "drafts that all stand, or none, would show nothing"
    assert outcome.p > 0.001, outcome


def test_the_test_notices_a_wrong_distribution() -> None:
    live, table = statistics.model()
    wrong = table.copy()
    wrong[:, 0] += 0.5
    outcome = statistics.compare(live, wrong, "draft", Sampling(temperature=1.0), DRAWS)
    assert outcome.p < 0.001


def test_penalties_and_filters_leave_out_what_they_leave_out_without_drafts() -> None:
    live, table = statistics.model()
    known, _ = statistics.said(live, "draft", Sampling(temperature=1.0, top_k=3), 1500, 1)
    best = [set((-row).argsort()[:3].tolist()) for row in table]
    assert all(token in best[before] for before, token in itertools.pairwise(known))
