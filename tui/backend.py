"""What the chat needs of an engine: five calls, and the events of `edger1.messages` as answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from edger1.messages import Event, Message


class Backend(Protocol):
    """An engine that holds one model. All calls come from the one event loop that the chat runs in.

    A request that fails ends with a `Failed` event, not with an exception. `Failed.error == "EngineError"` says that
    the engine is gone: the chat calls `load` again before it asks again.
    """

    def load(self) -> AsyncIterator[Event]:
        """Start the engine if it is not running and load the model: `Progress` ..., then `Loaded` or `Failed`."""

    def ask(self, messages: list[Message]) -> AsyncIterator[Event]:
        """Answer the whole conversation: `Progress`, `Thought` and `Text` ..., then `Done` or `Failed`."""

    def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        """Put the adapter in `folder` over the model, or take it off where None: `AdapterUsed` or `Failed`."""

    def cancel(self) -> None:
        """Stop the running answer within one token; its `Done` still comes. Does nothing where none is running."""

    async def close(self) -> None:
        """Stop the engine. May be called more than once."""
