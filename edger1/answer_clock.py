"""When what of an answer came, and the rates that follow from it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class AnswerClock:
    """Times of one answer by the clock of performance counters, in seconds; 0 for what has not been yet."""

    asked: float = field(default_factory=time.perf_counter)
    prefill: float = 0.0
    first: float = 0.0
    last: float = 0.0
    # When it was last told how the answer is coming along, and how many tokens there were.
    _told: float = 0.0
    _told_tokens: int = 0

    def begin(self) -> bool:
        """Note that the prompt is being read; whether that is for the first time."""
        if self.prefill:
            return False
        self.prefill = time.perf_counter()
        return True

    def add(self, *, first: bool) -> None:
        """Note that a token was said."""
        self.last = time.perf_counter()
        if first:
            self.first = self._told = self.last
            self._told_tokens = 1

    def since_told(self) -> float:
        """Return how long ago it was told how the answer is coming along, as of its last token."""
        return self.last - self._told

    def tell(self, tokens: int) -> float:
        """Note that it is told now, `tokens` having been said; returns how many a second those since then were."""
        # Tokens may have been taken back.
        rate = max(0, tokens - self._told_tokens) / (self.last - self._told)
        self._told, self._told_tokens = self.last, tokens
        return rate

    def prefill_rate(self, tokens: int) -> float | None:
        """Return tokens a second of a prompt of which so many were read."""
        # One token is always fed, to draw the first from; that is no prefill.
        return tokens / (self.first - self.prefill) if self.first and tokens > 1 else None

    def decode_rate(self, tokens: int) -> float | None:
        """Return tokens a second of an answer with so many tokens behind its first one."""
        # Tokens that were put behind the first one, as the end of a thought is, took no time of their own.
        return tokens / (self.last - self.first) if tokens > 0 and self.last > self.first else None

    @property
    def first_token_s(self) -> float | None:
        """Seconds until the first token."""
        return self.first - self.asked if self.first else None
