"""Hands streamed text to the screen in fewer, larger pieces."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable

INTERVAL_S = 0.05
LONGEST_S = 1.0
CPU_SHARE = 0.10 if (os.cpu_count() or 1) > 2 else 0.05
"""On two cores the engine computes on both of them: what the screen takes of one, the other waits for as well."""
CPU_BURST_S = 0.3
"""Time that may be used at once: the first lines of an answer build widgets and must not wait for that."""

FULL_COLLECTIONS = 100
"""Collections of younger objects that come before a full one, ten times as many as Python has."""


class Pacer:
    """Collects text and passes it on at most every `INTERVAL_S`.

    A long block makes each update dearer (it is laid out anew), so the interval grows, up to `LONGEST_S`, until this
    process uses no more than `CPU_SHARE` of a core since the text began. Nothing runs while no text comes.
    """

    def __init__(self, show: Callable[[str], Awaitable[None]]) -> None:
        self._show = show
        self._pending: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._shown_at = 0.0
        self._began_at = time.monotonic()
        self._cpu_began_at = time.process_time()
        self._one_at_a_time = asyncio.Lock()

    def feed(self, text: str) -> None:
        """Take a piece of text; it is shown soon."""
        self._pending.append(text)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def drain(self) -> None:
        """Show what is left at once, and wait until it is shown."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._flush()

    async def _run(self) -> None:
        while self._pending:
            while (wait := self._due() - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            # A drain that cancels the waiting must not tear the showing apart.
            await asyncio.shield(self._flush())

    def _due(self) -> float:
        used = time.process_time() - self._cpu_began_at
        affordable = self._began_at + (used - CPU_BURST_S) / CPU_SHARE
        return max(self._shown_at + INTERVAL_S, min(affordable, self._shown_at + LONGEST_S))

    async def _flush(self) -> None:
        async with self._one_at_a_time:
            text = "".join(self._pending)
            self._pending.clear()
            self._shown_at = time.monotonic()
            if text:
                await self._show(text)


def spare_collector() -> None:
    """Leave what is in memory by now out of garbage collection, once in this process.

    Modules and style sheets are hundreds of thousands of objects that live as long as the program; a full collection
    that looks through them holds the screen up for a tenth of a second, in the middle of an answer.
    """
    if not gc.get_freeze_count():
        gc.freeze()
        gc.set_threshold(*gc.get_threshold()[:2], FULL_COLLECTIONS)
