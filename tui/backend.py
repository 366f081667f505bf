"""What the chat needs of an engine, with the events of `edger1.messages` as answers."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from edger1.errors import EdgeR1Error
from edger1.messages import Event, Failed, Message, ToolCall
from edger1.tui.settings import Settings
from edger1.tui.tree import new_id


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

        Of `settings` all counts but the system prompt, which is among the messages. Where these ask for several
        samples, what each says, and its Done, come in `OfSample`, and `Sampled` whenever one is over. `tools` are
        functions as OpenAI's schemas describe them; for each one that the model calls a `ToolCall` comes before a
        `Done` with finish_reason "tools". With `continue_last` the last message is an assistant's, and only what goes
        on from its end is told; where it was cut in the middle of its thought, that is its "thought" and its content
        is empty.
        """

    def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        """Put the adapter in `folder` over the model, or take it off where None: `AdapterUsed` or `Failed`."""

    async def count_tokens(self, text: str) -> int | None:
        """Return how many tokens the model makes of `text`, or None while no model is loaded."""

    def cancel(self) -> None:
        """Stop all running answers within one token; their `Done` still come. Does nothing where none is running."""

    async def close(self) -> None:
        """Stop the engine. May be called more than once."""


async def to_the_end(events: AsyncIterator[Event], ending: type) -> AsyncGenerator[Event, None]:
    """Pass events on up to the first of type `ending` or Failed; make up a Failed where neither comes."""
    try:
        async for event in events:
            if isinstance(event, ToolCall) and not event.call_id:
                event = dataclasses.replace(event, call_id=new_id())
            yield event
            if isinstance(event, ending | Failed):
                return
        yield Failed("", "EngineError", "The engine went away in the middle of its work.")
    except EdgeR1Error as error:
        yield Failed("", type(error).__name__, str(error))
    except Exception as error:
        # The chat outlives whatever goes wrong below it: the user's conversation is in this process.
        yield Failed("", "EngineError", f"The engine failed unexpectedly ({type(error).__name__}: {error}).")
    finally:
        close = getattr(cast(Any, events), "aclose", None)
        if close is not None:
            await close()
