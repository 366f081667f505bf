"""The chat's side of the engine: one model, one conversation, one request at a time. Knows nothing of the screen."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from enum import Enum
from typing import Any, cast

from edger1.errors import EdgeR1Error
from edger1.messages import AdapterUsed, Done, Event, Failed, Loaded, Text, Thought
from edger1.tui.backend import Backend
from edger1.tui.conversation import Conversation


class State(Enum):
    """What the engine is doing, as far as the chat knows."""

    ASLEEP = "asleep"
    """Not started, or gone: load before asking."""
    LOADING = "loading"
    READY = "ready"
    ANSWERING = "answering"
    STOPPING = "stopping"
    """Told to stop; its last event has not come yet."""


class Session:
    """Loads, asks and stops, and keeps the conversation in step with what the user saw."""

    def __init__(self, backend: Backend, system: str | None = None) -> None:
        self.backend = backend
        self.conversation = Conversation(system)
        self.state = State.ASLEEP
        self.kept = False
        """Whether the last question got an answer, and is part of the conversation."""

    def restart(self) -> None:
        """Begin a new conversation under the same system prompt. A running answer keeps writing into the old one."""
        self.conversation = Conversation(self.conversation.system)

    def stop(self) -> bool:
        """Stop the running answer; False where there is none. What comes after this is not kept."""
        if self.state is not State.ANSWERING:
            return False
        self.state = State.STOPPING
        self.backend.cancel()
        return True

    async def load(self) -> AsyncGenerator[Event, None]:
        """Load the model: progress, then exactly one Loaded or Failed."""
        self.state = State.LOADING
        async with aclosing(_to_the_end(self.backend.load(), Loaded)) as events:
            async for event in events:
                if isinstance(event, Loaded):
                    self.state = State.READY
                elif isinstance(event, Failed):
                    self.state = State.ASLEEP
                yield event

    async def use_adapter(self, folder: str | None) -> AsyncGenerator[Event, None]:
        """Change the model's adapter: exactly one AdapterUsed or Failed. The conversation goes on."""
        self.state = State.LOADING
        async with aclosing(_to_the_end(self.backend.use_adapter(folder), AdapterUsed)) as events:
            async for event in events:
                gone = isinstance(event, Failed) and event.error == "EngineError"
                self.state = State.ASLEEP if gone else State.READY
                yield event

    async def ask(self, question: str) -> AsyncGenerator[Event, None]:
        """Ask and yield what the user may see of the answer, then exactly one Done or Failed; `kept` tells the rest."""
        conversation = self.conversation
        conversation.begin(question)
        self.state = State.ANSWERING
        try:
            async with aclosing(_to_the_end(self.backend.ask(conversation.messages()), Done)) as events:
                async for event in events:
                    if isinstance(event, Done):
                        self.state = State.READY
                    elif isinstance(event, Failed):
                        self.state = State.ASLEEP if event.error == "EngineError" else State.READY
                    elif self.state is State.STOPPING and isinstance(event, Text | Thought):
                        continue
                    elif isinstance(event, Text):
                        conversation.hear(event.text)
                    yield event
        finally:
            self.kept = conversation.end()


async def _to_the_end(events: AsyncIterator[Event], ending: type) -> AsyncGenerator[Event, None]:
    """Pass events on up to the first of type `ending` or Failed; make up a Failed where neither comes."""
    try:
        async for event in events:
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
