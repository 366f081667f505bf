"""What the chat needs of an engine, with the events of `edger1.messages` as answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from edger1.messages import Event, Message
from edger1.tui.settings import Settings


class Backend(Protocol):
    """An engine that holds one model, or none yet. All calls come from the one event loop that the chat runs in.

    A request that fails ends with a `Failed` event, not with an exception. `Failed.error == "EngineError"` says that
    the engine is gone: the chat calls `load` again before it asks again.
    """

    def choose(self, model: str, folder: Path, adapter: str | None = None) -> None:
        """Have the next `load` load the model in `folder`, called `model`, in place of the present one.

        `adapter` is the folder of an adapter to put over it.
        """

    def load(self) -> AsyncIterator[Event]:
        """Load the model that was chosen last: `Progress` ..., then `Loaded` or `Failed`.

        Starts the engine if it is not running. The present model is closed first, so that both never need memory at
        once: after `Failed` there is none, and another can be chosen.
        """

    def ask(
        self,
        messages: list[Message],
        *,
        settings: Settings,
        tools: Sequence[dict[str, Any]] = (),
        continue_last: bool = False,
    ) -> AsyncIterator[Event]:
        """Answer the whole conversation: `Progress`, `Thought`, `Text`, `Running` ..., then `Done` or `Failed`.

        Of `settings` all but the system prompt counts, which is among the messages. `tools` are functions as OpenAI's
        schemas describe them; for each one that the model calls a `ToolCall` comes before a `Done` with finish_reason
        "tools". With `continue_last` the last message is an assistant's, and only what goes on from its end is told;
        where it was cut in the middle of its thought, that is its "thought" and its content is empty.
        """

    def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        """Put the adapter in `folder` over the model, or take it off where None: `AdapterUsed` or `Failed`."""

    async def count_tokens(self, text: str) -> int | None:
        """Return how many tokens the model makes of `text`, or None while no model is loaded."""

    def cancel(self) -> None:
        """Stop the running answer within one token; its `Done` still comes. Does nothing where none is running."""

    async def close(self) -> None:
        """Stop the engine. May be called more than once."""
