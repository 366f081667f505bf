"""Fetches under way and waiting: one at a time, in the order they were asked for, whatever screen is open.

Nothing here knows of Textual. Runs in one event loop; who listens is told after each change, during a download at most
four times a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

from edger1.errors import EdgeR1Error
from edger1.tui.catalogue import Catalogue, Fetched, FetchFailed, Note, Pace, Step

_INTERVAL_S = 0.25

Status = Literal["waiting", "running", "stopping", "stopped", "done", "failed"]


@dataclass(frozen=True)
class Fetch:
    """One fetch as it stands. `message` says why it failed, `note` the last thing that a person may want to know."""

    name: str
    status: Status = "waiting"
    step: Step | None = None
    rate: float | None = None
    """Units a second."""
    left_s: float | None = None
    note: str = ""
    message: str = ""
    folder: Path | None = None

    @property
    def open(self) -> bool:
        """Whether it is under way or will be."""
        return self.status in ("waiting", "running", "stopping")


OnChange = Callable[[Fetch], None]


class Fetches:
    """The queue of fetches of one chat."""

    def __init__(self, catalogue: Catalogue, clock: Callable[[], float] = time.monotonic) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._all: dict[str, Fetch] = {}
        self._listeners: list[OnChange] = []
        self._task: asyncio.Task[None] | None = None
        self._running: asyncio.Task[None] | None = None

    def listen(self, on_change: OnChange) -> Callable[[], None]:
        """Call `on_change` after each change, until the function that this returns is called."""
        self._listeners.append(on_change)
        return lambda: self._listeners.remove(on_change)

    def of(self, name: str) -> Fetch | None:
        """Return how the latest fetch of a model stands; None where there was none."""
        return self._all.get(name)

    @property
    def open(self) -> list[Fetch]:
        """The fetches under way and waiting, in their order."""
        return [fetch for fetch in self._all.values() if fetch.open]

    def add(self, name: str) -> None:
        """Fetch a model after those that wait already; one that is open is left as it is."""
        known = self._all.get(name)
        if known is not None and known.open:
            return
        self._all.pop(name, None)
        self._set(Fetch(name))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    def stop(self, name: str) -> bool:
        """Stop a fetch or take it out of the queue, keeping what came; False where there is none to stop."""
        known = self._all.get(name)
        if known is None or not known.open:
            return False
        if known.status == "waiting":
            self._set(replace(known, status="stopped"))
        elif known.status == "running" and self._running is not None:
            self._set(replace(known, status="stopping"))
            self._running.cancel()
        return True

    async def close(self) -> None:
        """Stop all of them and wait until they are."""
        for fetch in self.open:
            self.stop(fetch.name)
        if self._task is not None:
            await asyncio.wait([self._task])

    def _set(self, fetch: Fetch) -> None:
        self._all[fetch.name] = fetch
        for listener in list(self._listeners):
            listener(fetch)

    async def _run(self) -> None:
        while (fetch := next((each for each in self._all.values() if each.status == "waiting"), None)) is not None:
            self._set(replace(fetch, status="running"))
            self._running = asyncio.create_task(self._one(fetch.name))
            await asyncio.wait([self._running])
            left = self._all[fetch.name]
            if left.open:
                self._set(replace(left, status="stopped", step=None, rate=None, left_s=None))
            self._running = None

    async def _one(self, name: str) -> None:
        pace, told_s = Pace(), -_INTERVAL_S
        try:
            async with aclosing(cast(Any, self._catalogue.fetch(name))) as events:
                async for event in events:
                    at = self._all[name]
                    if at.status == "stopping":
                        continue
                    if isinstance(event, Step):
                        now = self._clock()
                        rate, left_s = pace.update(event, now)
                        whole = event.total > 0 and event.done >= event.total
                        if now - told_s >= _INTERVAL_S or whole or (at.step and at.step.stage != event.stage):
                            told_s = now
                            self._set(replace(at, step=event, rate=rate, left_s=left_s))
                    elif isinstance(event, Note):
                        self._set(replace(at, note=event.text))
                    elif isinstance(event, Fetched):
                        self._set(replace(at, status="done", folder=event.folder))
                    elif isinstance(event, FetchFailed):
                        self._set(replace(at, status="failed", message=event.message))
            if (at := self._all[name]).status == "running":
                self._set(replace(at, status="failed", message=f"The fetch of {name} ended without a word. Try again."))
        except EdgeR1Error as error:
            self._set(replace(self._all[name], status="failed", message=str(error)))
        except Exception as error:
            # The chat outlives whatever goes wrong below it.
            self._set(replace(self._all[name], status="failed", message=f"{type(error).__name__}: {error}"))
