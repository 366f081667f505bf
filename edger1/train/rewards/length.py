"""Rewards for how long a completion is, in tokens."""

from __future__ import annotations

import math

from edger1.errors import UsageError
from edger1.train.rewards.completion import Completion


def length(completion: Completion, *, target: int) -> float:
    """Give 1 at `target` tokens, falling in proportion to 0 at none and at twice as many.

    After the exact-length reward of L1 (arXiv:2503.04697), bounded below.
    """
    if target < 1:
        raise UsageError(f"length has target={target}; expected at least 1 token.")
    return max(0.0, 1.0 - abs(completion.tokens - target) / target)


def overlong(completion: Completion, *, limit: int, buffer: int) -> float:
    """Give 0 up to `limit - buffer` tokens, falling in proportion to -1 at `limit` and beyond.

    DAPO's soft overlong punishment (arXiv:2503.14476, equation 13).
    """
    if not 0 < buffer <= limit:
        raise UsageError(f"overlong has limit={limit} and buffer={buffer}; expected a buffer from 1 to the limit.")
    return -min(1.0, max(0.0, (completion.tokens - (limit - buffer)) / buffer))


def cosine(
    completion: Completion,
    *,
    correct: bool,
    longest: int,
    right_short: float = 2.0,
    right_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> float:
    """Reward short right answers and long wrong ones, along half a cosine over 0 to `longest` tokens.

    The cosine reward of arXiv:2502.03373, with its default values. `correct` is whether another reward, named by `by`,
    gave 1 or more.
    """
    if longest < 1:
        raise UsageError(f"cosine has longest={longest}; expected at least 1 token.")
    if completion.tokens >= longest or not completion.finished:
        return exceeded
    begin, end = (right_short, right_long) if correct else (wrong_short, wrong_long)
    return end + 0.5 * (begin - end) * (1.0 + math.cos(math.pi * completion.tokens / longest))
