"""How the learning rate changes with the steps."""

from __future__ import annotations

import math
from typing import Protocol


class Scheduled(Protocol):
    """The settings that decide it; shares are fractions of all steps."""

    @property
    def steps(self) -> int:
        """Steps of the whole schedule."""

    @property
    def schedule(self) -> str:
        """Either "wsd" or "cosine"."""

    @property
    def warmup(self) -> float:
        """Share of the steps in which the rate rises."""

    @property
    def decay(self) -> float:
        """Share of the steps in which wsd falls."""

    @property
    def final(self) -> float:
        """Rate at the end, as a share of the peak."""


def rate_share(step: int, settings: Scheduled) -> float:
    """Return the learning rate of a step (from 0) as a share of its peak, in (0, 1].

    Warm-up is linear from 1 / (warm-up steps). wsd (warmup-stable-decay, arXiv 2404.06395) stays at the peak and falls
    linearly over the last `decay` of the steps; cosine falls from the end of the warm-up on. Both end at `final`.
    """
    total = settings.steps
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "cosine":
        done = (step - warmup) / max(1, total - warmup)
        return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    fall = round(settings.decay * total)
    left = total - step
    if fall == 0 or left > fall:
        return 1.0
    return settings.final + (1 - settings.final) * max(0.0, left / (fall + 1))
