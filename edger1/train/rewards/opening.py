"""Rewards by name: what `[rewards]` of a settings file and `--reward` say, made into functions that score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from edger1.train.rewards.completion import Completion

TIMEOUT_S = 10.0


class Rewards:
    """Several rewards with weights. Close it, or use it in a `with` block, to end its worker process."""

    names: tuple[str, ...]
    weights: dict[str, float]
    failures: list[str]
    """What went wrong and was counted as 0, where `on_error` is "zero"; the newest last."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def score(self, completions: Sequence[Completion]) -> list[dict[str, float]]:
        """Return each completion's value of every reward, unweighted.

        Raises RewardError where a reward raises, gives no finite number or takes longer than its time.
        """
        raise NotImplementedError

    def total(self, scores: dict[str, float]) -> float:
        """Return the weighted sum of one completion's values."""
        raise NotImplementedError

    def close(self) -> None:
        """End the worker process. Closing twice does nothing."""


def open_rewards(
    specs: Sequence[str],
    *,
    timeout_s: float = TIMEOUT_S,
    on_error: str = "stop",
    folder: Path | None = None,
) -> Rewards:
    """Open rewards, each given as `NAME`, `gym:TASK` or `FILE.py:FUNCTION`, then `:key=value,...` where wanted.

    `weight=0.5` among the keys is the reward's weight in the total, 1 otherwise; the others are the function's own.
    `timeout_s`: of one completion's score. `on_error`: "stop" raises RewardError, "zero" counts 0 and notes the
    failure. `folder`: what relative files are relative to, the current folder otherwise.

    Raises UsageError for a name, file, function or key that is not there.
    """
    raise NotImplementedError
