"""The chat's engine: a child process, so that a crash or an out-of-memory kill takes no conversation with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from edger1.client import ChildConnection, aevents, next_id
from edger1.messages import (
    AdapterUsed,
    Cancel,
    Event,
    Failed,
    Generate,
    Load,
    Loaded,
    Message,
    Unload,
    UseAdapter,
)


class ChildBackend:
    """One model in one child process; implements `edger1.tui.Backend`.

    The child is started here and not in `load`, so that it imports MLX while the terminal is being drawn.
    """

    def __init__(
        self,
        folder: Path,
        *,
        memory: int | None,
        context: int | None,
        precision: str,
        expert_slots: str | None = None,
        adapter: str | None = None,
    ) -> None:
        self._load = (str(folder), memory, context, precision, expert_slots)
        self._adapter = adapter
        self._memory = memory
        self._connection: ChildConnection | None = ChildConnection(memory)
        self._model: str | None = None
        self._running: str | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._connection.pid if self._connection is not None else None

    async def load(self) -> AsyncIterator[Event]:
        """Start the engine if it is not running and load the model: Progress ..., then Loaded or Failed."""
        if self._connection is not None and self._model is not None:
            await self._drop_model()
        if self._connection is None:
            self._connection = ChildConnection(self._memory)
        async for event in aevents(self._connection, Load(next_id(), *self._load, self._adapter)):
            if isinstance(event, Loaded):
                self._model = event.model
            if isinstance(event, Failed):
                self._forget(event)
            yield event

    async def _drop_model(self) -> None:
        assert self._connection is not None
        assert self._model is not None
        async for event in aevents(self._connection, Unload(next_id(), self._model)):
            if isinstance(event, Failed):
                self._forget(event)
        self._model = None

    async def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        """Put the adapter in `folder` over the model, now and when it is loaded anew; None takes it off."""
        from edger1.model import adapter_folder

        if self._connection is None or self._model is None:
            yield Failed(next_id(), "EngineError", "The engine is not running.")
            return
        path = adapter_folder(folder)
        async for event in aevents(self._connection, UseAdapter(next_id(), self._model, path)):
            if isinstance(event, AdapterUsed):
                self._adapter = path
            if isinstance(event, Failed):
                self._forget(event)
            yield event

    async def ask(self, messages: list[Message]) -> AsyncIterator[Event]:
        """Answer the whole conversation: Progress, Thought and Text ..., then Done or Failed."""
        if self._connection is None or self._model is None:
            yield Failed(next_id(), "EngineError", "The engine is not running.")
            return
        request = Generate(next_id(), self._model, messages=messages)
        self._running = request.id
        try:
            async for event in aevents(self._connection, request):
                if isinstance(event, Failed):
                    self._forget(event)
                yield event
        finally:
            self._running = None

    def cancel(self) -> None:
        """Stop the running answer within one token; its Done still comes. Does nothing where none is running."""
        if self._connection is not None and self._running is not None:
            self._connection.send(Cancel(next_id(), self._running))

    async def close(self) -> None:
        """Stop the engine. May be called more than once."""
        connection, self._connection, self._model = self._connection, None, None
        if connection is not None:
            # The step that is running is finished first, which must not stop the screen.
            await asyncio.to_thread(connection.close)

    def _forget(self, failed: Failed) -> None:
        """After an EngineError the next load starts from a fresh process."""
        if failed.error == "EngineError":
            connection, self._connection, self._model = self._connection, None, None
            if connection is not None:
                connection.close()
