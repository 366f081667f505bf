"""What a dataset is like, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edger1.train.datasets.rows import Row
from edger1.train.datasets.template import Encoding


@dataclass(frozen=True)
class Statistics:
    """Figures of a dataset; `lines()` says them to a reader."""

    rows: int
    documents: int
    tokens: int
    counted: int
    longest: int
    quantiles: dict[int, int] = field(default_factory=dict)
    """Percentile -> document length in tokens."""
    reasoning: float = 0.0
    """Share of rows with a thought."""
    languages: dict[str, float] = field(default_factory=dict)
    """Share of rows by language, largest first."""

    def lines(self) -> list[str]:
        """Return the figures as lines of text, with a histogram of lengths."""
        raise NotImplementedError


def describe(rows: Sequence[Row], encoding: Encoding) -> Statistics:
    """Measure rows and what they became."""
    raise NotImplementedError
