"""The settings of logit distillation; apart from it, because they are read where MLX is not needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edger1.errors import UsageError


@dataclass(frozen=True)
class DistillSettings:
    """What `[distill]` of a settings file may say."""

    teacher: str = ""
    """Alias, hub name or folder of the teacher; it must have the student's tokenizer."""
    top: int = 50
    """How many of the teacher's likeliest tokens are kept a token."""
    temperature: float = 1.0
    share: float = 0.9
    """Of the divergence in the loss; the rest is cross entropy with the text (Hinton et al. 2015 weigh it low)."""
    cache: str = ""
    """File of what the teacher said, shared by runs; empty: in the run's folder."""

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        if not self.teacher:
            raise UsageError("[distill] teacher is missing; name the model to learn from.")
        if self.top < 1:
            raise UsageError(f"[distill] top is {self.top}; expected at least 1 token.")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"[distill] temperature is {self.temperature:g}; expected more than 0.")
        if not 0 < self.share <= 1:
            raise UsageError(f"[distill] share is {self.share:g}; expected more than 0, up to 1.")
