"""Reads single values of files that somebody else wrote."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

_NAMESPACE = UUID("6f1c7d1e-3c5b-4c58-9a51-0f1d0f6b5a11")
_LATEST = 253_402_300_799.0
"""The end of the year 9999, after which dates cannot be shown."""


def own_id(*parts: str) -> str:
    """Return an id that is the same whenever the same thing is brought in."""
    return uuid5(_NAMESPACE, "\x00".join(parts).encode("utf-8", "replace").decode()).hex


def text(value: Any) -> str:
    """Return a text, "" for what is none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else ""


def number(value: Any, otherwise: float) -> float:
    """Return a finite number, `otherwise` for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return otherwise


def mapping(value: Any) -> dict[str, Any]:
    """Return a mapping, an empty one for what is none."""
    return value if isinstance(value, dict) else {}


def listed(value: Any) -> list[Any]:
    """Return a list, an empty one for what is none."""
    return value if isinstance(value, list) else []


def moment(value: Any, otherwise: float | None = None) -> float:
    """Return Unix seconds of a number or an ISO date; what is neither gives `otherwise`, by default the present."""
    found: float | None = None
    if isinstance(value, str):
        try:
            date = datetime.fromisoformat(value)
            found = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            found = None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value) if abs(value) <= _LATEST else None
    if found is None or not math.isfinite(found) or not 0 < found <= _LATEST:
        return time.time() if otherwise is None else otherwise
    return found
