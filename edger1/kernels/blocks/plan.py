"""What is found out about a layer and what calls it: the operation that stands for it, or for a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edger1.kernels.blocks.recognise import Anatomy


@dataclass(frozen=True)
class Plan:
    """What of a layer the operation `call` stands for."""

    anatomy: Anatomy
    runs: str
    call: Any
    reason: str = ""
    """Why it is not the whole layer."""
