"""The chat's engine: a child process, so that a crash or an out-of-memory kill takes no conversation with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1.client import ChildConnection, aevents, next_id
from edger1.messages import (
    AdapterUsed,
    Cancel,
    Counted,
    CountTokens,
    Event,
    Failed,
    Generate,
    Load,
    Loaded,
    Message,
    Request,
    Unload,
    UseAdapter,
)

if TYPE_CHECKING:
    from edger1.tui.settings import Settings


class ChildBackend:
    """One model at a time in one child process; implements `edger1.tui.Backend`.

    The child is started by the first `load`: before that its imports would take the time from those of the screen.
    Without a folder nothing is loaded until one has been chosen. `memory` is the ceiling that all models have in turn,
    in bytes. `draft` is the folder of a model that drafts for the one in `folder`, and for no other.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        memory: int | None,
        context: int | None,
        precision: str,
        expert_slots: str | None = None,
        adapter: str | None = None,
        kv_bits: int | None = None,
        draft: Path | None = None,
    ) -> None:
        self._folder = folder
        self._load = (memory, context, precision, expert_slots)
        self._kv_bits = kv_bits
        self._adapter = adapter
        # It speaks the vocabulary of this one model.
        self._draft = (folder, draft)
        self._memory = memory
        self._connection: ChildConnection | None = None
        # Loaded, or perhaps so: a load that nobody waited for may have come to its end.
        self._held: str | None = None
        self._model: str | None = None
        self._running: set[str] = set()

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._connection.pid if self._connection is not None else None

    def choose(self, model: str, folder: Path, adapter: str | None = None) -> None:
        """Have the next `load` load another model, with an adapter's folder or None, in place of the present one."""
        from edger1.model import adapter_folder

        self._folder, self._adapter = folder, adapter_folder(adapter)

    async def load(self) -> AsyncIterator[Event]:
        """Load the chosen model in place of the present one: Progress ..., then Loaded or Failed.

        Starts the engine if it is not running. Where it fails there is no model, and another can be chosen.
        """
        if self._folder is None:
            yield Failed(next_id(), "UsageError", "No model is chosen yet. Pick one first.")
            return
        await self._drop_model()
        if self._connection is None:
            self._connection = ChildConnection(self._memory)
        request = Load(
            next_id(), str(self._folder), *self._load, self._adapter, draft=self._drafting, kv_bits=self._kv_bits
        )
        self._held = request.id
        async with aclosing(self._events(request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Loaded):
                    self._model = event.model
                yield event

    @property
    def _drafting(self) -> str | None:
        folder, draft = self._draft
        return str(draft) if draft is not None and folder == self._folder else None

    async def _drop_model(self) -> None:
        held, self._held, self._model = self._held, None, None
        if held is not None and self._connection is not None:
            # Of one that was not loaded it says the same.
            async for _ in self._events(Unload(next_id(), held)):
                pass

    async def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        """Put the adapter in `folder` over the model, now and when it is loaded anew; None takes it off."""
        from edger1.model import adapter_folder

        if self._connection is None or self._model is None:
            yield _not_running()
            return
        path = adapter_folder(folder)
        async with aclosing(self._events(UseAdapter(next_id(), self._model, path))) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, AdapterUsed):
                    self._adapter = path
                yield event

    async def ask(
        self,
        messages: list[Message],
        *,
        settings: Settings,
        tools: Sequence[dict[str, Any]] = (),
        continue_last: bool = False,
    ) -> AsyncIterator[Event]:
        """Answer the whole conversation, or go on with its last message; see `edger1.tui.Backend`."""
        if self._connection is None or self._model is None:
            yield _not_running()
            return
        request = Generate(
            next_id(),
            self._model,
            messages=messages,
            max_tokens=settings.max_tokens,
            sampling=settings.sampling,
            think=settings.think,
            think_budget=settings.think_budget,
            think_at_least=settings.think_at_least,
            speculate=settings.speculate,
            samples=settings.samples,
            each_sample=settings.samples > 1,
            context_shift=settings.context_shift,
            tools=list(tools),
            continue_last=continue_last,
        )
        self._running.add(request.id)
        try:
            async with aclosing(self._events(request)) as events:  # type: ignore[type-var]
                async for event in events:
                    yield event
        finally:
            self._running.discard(request.id)

    async def count_tokens(self, text: str) -> int | None:
        """Return how many tokens the model makes of `text`, or None while there is no model that could tell."""
        if self._connection is None or self._model is None:
            return None
        async for event in self._events(CountTokens(next_id(), self._model, text)):
            if isinstance(event, Counted):
                return event.tokens
        return None

    def cancel(self) -> None:
        """Stop all running answers within one token; their Done still come. Does nothing where none is running."""
        if self._connection is not None:
            for running in self._running:
                self._connection.send(Cancel(next_id(), running))

    async def close(self) -> None:
        """Stop the engine. May be called more than once."""
        connection = self._connection
        self._connection = self._model = self._held = None
        if connection is not None:
            # The step that is running is finished first, which must not stop the screen.
            await asyncio.to_thread(connection.close)

    async def _events(self, request: Request) -> AsyncIterator[Event]:
        """Send a request and yield its events. After an EngineError the next load starts from a fresh process."""
        connection = self._connection
        assert connection is not None
        async with aclosing(aevents(connection, request)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Failed) and event.error == "EngineError" and self._connection is connection:
                    await self.close()
                yield event


def _not_running() -> Failed:
    return Failed(next_id(), "EngineError", "The engine is not running.")
