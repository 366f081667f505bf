"""stub"""
from __future__ import annotations
from collections.abc import Collection, Sequence
from typing import Protocol
import numpy as np

class Policy(Protocol):
    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None: ...
    def victim(self, resident: Collection[int], keep: Collection[int]) -> int | None: ...

class Lru:
    def __init__(self, experts: int) -> None:
        self._last = [0] * experts
        self._now = 0
    def use(self, experts, scores=None):
        self._now += 1
        for e in experts: self._last[e] = self._now
    def victim(self, resident, keep):
        return min((e for e in resident if e not in keep), key=self._last.__getitem__, default=None)
DEFAULT_POLICY = Lru
