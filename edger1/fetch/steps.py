"""How a pull tells what it is doing, and the errors that mean "try the next source"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edger1.errors import SourceError


@dataclass(frozen=True)
class Step:
    """One report: stage is "download", "convert", "calibrate" or "fit"; `done` of `total` `unit`s, 0 where unknown."""

    stage: str
    done: int
    total: int
    unit: str = "bytes"


OnProgress = Callable[[Step], None]
OnNote = Callable[[str], None]


@dataclass(frozen=True)
class Watch:
    """Who listens to a pull: `progress` gets the steps, `note` a sentence that a person may want to read."""

    progress: OnProgress = field(default=lambda step: None)
    note: OnNote = field(default=lambda text: None)


class UnavailableError(SourceError):
    """This source has nothing to give now (unreachable, refused, damaged); another one may."""
