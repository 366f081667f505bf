"""What the chat knows of models: those on this machine, those that can be fetched, and the adapters that fit one.

The chat sees them through the `Catalogue` protocol; `edger1.cli.catalogue` implements it. Names, licences and reasons
come from files and servers: they are data, to be shown without markup and cleaned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from edger1.messages import Sampling

Fit = Literal["fits", "streams", "too big", "unknown"]
Kind = Literal["moe", "dense"]

_WINDOW_S = 10.0


@dataclass(frozen=True)
class Entry:
    """A model, here or to be fetched.

    `size_bytes` is that of its files, `needs_bytes` what it takes of memory under the ceiling and context of this chat
    (the smallest ceiling that would do where it is too big), `why` one sentence on the fit. `numbers` are the plan's,
    as pairs of what and how much. `own` says that it comes with the program, `linked` that its folder lies elsewhere:
    neither is deleted.
    """

    name: str
    title: str
    size_bytes: int | None = None
    installed: bool = False
    folder: Path | None = None
    licence: str | None = None
    kind: Kind = "dense"
    fit: Fit = "unknown"
    needs_bytes: int | None = None
    why: str = ""
    parameters: int | None = None
    active_parameters: int | None = None
    quantization: str | None = None
    context_length: int | None = None
    last_used: str | None = None
    problem: str | None = None
    numbers: tuple[tuple[str, str], ...] = ()
    own: bool = False
    linked: bool = False
    begun_bytes: int = 0
    """What an unfinished fetch of it left on the disk, to go on from."""


@dataclass(frozen=True)
class AdapterEntry:
    """A folder with an adapter that fits a model."""

    name: str
    folder: Path
    kind: str
    rank: int | None
    size_bytes: int
    layout: Literal["mlx-lm", "PEFT"]
    of: str = ""
    """The model that it was trained on, as it says itself."""


@dataclass(frozen=True)
class Step:
    """A step of a fetch: stage is "download", "convert", "calibrate" or "fit"; total 0 where it is not known."""

    stage: str
    done: int
    total: int
    unit: str = "bytes"


@dataclass(frozen=True)
class Note:
    """A sentence for a person: another source is tried, another fetch is waited for."""

    text: str


@dataclass(frozen=True)
class Fetched:
    """The end of a fetch: the model is in `folder`."""

    folder: Path


@dataclass(frozen=True)
class FetchFailed:
    """The end of a fetch that failed: `error` names an EdgeR1Error class. What came is kept."""

    error: str
    message: str


FetchEvent = Step | Note | Fetched | FetchFailed


@dataclass(frozen=True)
class Advice:
    """A model to begin with on this machine, and why; `download_s` is what fetching takes at 100 Mbit/s."""

    name: str
    title: str
    role: Literal["small", "fits", "streams"]
    why: str
    size_bytes: int | None = None
    download_s: float | None = None
    licence: str | None = None
    folder: Path | None = None
    """Where it is, if it is on this machine already."""


@dataclass(frozen=True)
class Chosen:
    """What the user decided on: the model as it is called, its folder, and an adapter's folder where one is wanted."""

    name: str
    folder: Path
    adapter: Path | None = None


class Catalogue(Protocol):
    """All that can be asked of models. Nothing here blocks the event loop that it is called from."""

    async def entries(self) -> list[Entry]:
        """Return every model that is here, then every other one that the registry knows. Raises EdgeR1Error."""
        ...

    async def recommended(self) -> list[Advice]:
        """Return a few models to begin with, the one to take first. Raises EdgeR1Error."""
        ...

    async def find(self, text: str) -> Chosen:
        """Return the model that a name or the path of a folder means. Raises EdgeR1Error if none is here."""
        ...

    def fetch(self, name: str) -> AsyncIterator[FetchEvent]:
        """Fetch a model: Step and Note ..., then Fetched or FetchFailed. Closing it stops; what came is kept."""
        ...

    async def adapters(self, model: Path) -> list[AdapterEntry]:
        """Return the adapters that fit the model in a folder, the newest first."""
        ...

    async def defaults(self, model: Path) -> Sampling:
        """Return what the model in a folder draws with where nobody says otherwise."""
        ...

    async def remove(self, name: str) -> int:
        """Delete an installed model, or what an unfinished fetch left; returns the bytes freed. Raises EdgeR1Error."""
        ...


class Pace:
    """The rate of a transfer over the last ten seconds, and the time that is left."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._stage = ""

    def update(self, step: Step, now_s: float) -> tuple[float | None, float | None]:
        """Take a step; returns units a second and seconds left, None where they cannot be told yet."""
        if step.stage != self._stage or (self._seen and step.done < self._seen[-1][1]):
            self._seen.clear()
            self._stage = step.stage
        self._seen.append((now_s, step.done))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        began_s, begun = self._seen[0]
        if now_s - began_s < 0.5 or step.done <= begun:
            return None, None
        rate = (step.done - begun) / (now_s - began_s)
        return rate, (step.total - step.done) / rate if step.total else None
