"""The chat's side of the engine: one model, one conversation, one request at a time. Knows nothing of the screen.

The conversation is a tree (`edger1.tui.tree`); every way of going on, be it a question, another answer, an edit or the
rest of an answer, is a generator of events that ends with the engine free again. What happens is recorded as it does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from edger1.messages import AdapterUsed, Done, Event, Failed, Loaded, Message, Sampling, Text, Thought
from edger1.tools import loop
from edger1.tools.kinds import Result, Tool
from edger1.tools.loop import Approve, CallState, RoundBegins, Rounds, RoundsEnd, Step
from edger1.tui.backend import Backend, to_the_end
from edger1.tui.hearing import Hearing
from edger1.tui.recorder import Recorder
from edger1.tui.samples import FirstEnded, Samples, Voted
from edger1.tui.settings import Settings
from edger1.tui.store import Stored
from edger1.tui.talk import Talk
from edger1.tui.title import TITLE_TOKENS, tidy, title_question
from edger1.tui.tree import Node, Tree


class State(Enum):
    """What the engine is doing, as far as the chat knows."""

    EMPTY = "empty"
    """No model is chosen."""
    ASLEEP = "asleep"
    """Not started, or gone: load before asking."""
    LOADING = "loading"
    READY = "ready"
    ANSWERING = "answering"
    STOPPING = "stopping"
    """Told to stop; its last event has not come yet."""


@dataclass(frozen=True)
class Begun:
    """A message is part of the conversation: a question, an answer that is about to come, a tool's result."""

    node: Node


@dataclass(frozen=True)
class Rewound:
    """What is shown ends elsewhere: at the message before the one that comes, or, where no word came, where it did."""


@dataclass(frozen=True)
class Ended:
    """An answer is complete, for better or worse. `done` is None where it failed."""

    node: Node
    done: Done | None


SessionEvent = Event | Begun | Rewound | Ended | CallState | RoundsEnd | FirstEnded | Voted


class Session:
    """Loads, asks and stops, and keeps the conversation in step with what the user saw."""

    def __init__(
        self,
        backend: Backend,
        settings: Settings | None = None,
        *,
        model: str | None = None,
        adapter: str | None = None,
        recorder: Recorder | None = None,
        tools: Tools | None = None,
        approve: Approve | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.model = model
        self.adapter = adapter
        self.recorder = recorder
        self.off: set[str] = set()
        """Tools and origins of tools that are not offered in this conversation."""
        self._tools = tools or _NoTools()
        self._approve = approve or _nothing_allowed
        self._rounds: Rounds | None = None
        self._samples: Samples | None = None
        self.talk = Talk(recorder, settings or Settings())
        self.state = State.ASLEEP if model is not None else State.EMPTY
        self._clock = clock
        self._naming: asyncio.Future[None] | None = None

    # The conversation

    @property
    def tree(self) -> Tree:
        """The messages of the conversation."""
        return self.talk.tree

    def restart(self) -> None:
        """Begin a new conversation under the same settings, with all tools.

        A running answer keeps writing into the old one, and has the tools of that.
        """
        self.talk, self.off = Talk(self.recorder, self.talk.settings), set()

    def open(self, stored: Stored) -> None:
        """Go on with a conversation of the store, under its own settings; the model stays as it is.

        Another one than this has all tools.
        """
        if stored.id != self.talk.id:
            self.off = set()
        self.talk = Talk(self.recorder, self.talk.settings, stored)

    def edit_answer(self, node_id: str, text: str) -> Node:
        """Put other words into an answer's place, as an alternative to it."""
        old = self.tree[node_id]
        return self._add(self.talk, Node("assistant", text, parent=old.parent, model=old.model, finish="edited"))

    # The engine

    def choose(self, model: str, folder: Path, adapter: str | None = None) -> None:
        """Make another model the one that `load` loads; the conversation goes on with it."""
        self.backend.choose(model, folder, adapter)
        self.model, self.adapter = model, adapter
        self.state = State.ASLEEP
        self.talk.use(model, adapter)

    def stop(self) -> bool:
        """Stop the running answer; False where there is none. What comes after this is not kept."""
        if self.state is not State.ANSWERING:
            return False
        self.state = State.STOPPING
        self.backend.cancel()
        if self._rounds is not None:
            self._rounds.stop()
        if self._samples is not None:
            self._samples.stop()
        return True

    async def load(self) -> AsyncGenerator[Event, None]:
        """Load the model: progress, then exactly one Loaded or Failed."""
        self.state = State.LOADING
        await self._stop_naming()
        async with aclosing(to_the_end(self.backend.load(), Loaded)) as events:
            async for event in events:
                if isinstance(event, Loaded):
                    self.state = State.READY
                elif isinstance(event, Failed):
                    self.state = State.ASLEEP
                yield event

    async def use_adapter(self, folder: str | None) -> AsyncGenerator[Event, None]:
        """Change the model's adapter: exactly one AdapterUsed or Failed. The conversation goes on."""
        await self._stop_naming()
        self.state = State.LOADING
        async with aclosing(to_the_end(self.backend.use_adapter(folder), AdapterUsed)) as events:
            async for event in events:
                gone = isinstance(event, Failed) and event.error == "EngineError"
                self.state = State.ASLEEP if gone else State.READY
                if isinstance(event, AdapterUsed):
                    self.adapter = folder
                    self.talk.use(self.model or "", folder)
                yield event

    async def ask(self, asked: Node) -> AsyncGenerator[SessionEvent, None]:
        """Ask a question at the end of what is shown.

        A question that got no word of an answer is no part of what is shown afterwards; it is kept all the same.
        """
        asked.parent = self.tree.head
        async with aclosing(self._ask(asked)) as events:
            async for event in events:
                yield event

    async def ask_instead(self, node_id: str, text: str) -> AsyncGenerator[SessionEvent, None]:
        """Ask something else in the place of a question, with what went with it."""
        old = self.tree[node_id]
        async with aclosing(self._ask(Node("user", text, parent=old.parent, attachments=old.attachments))) as events:
            async for event in events:
                yield event

    async def answer(self, to: str) -> AsyncGenerator[SessionEvent, None]:
        """Answer a question, or go on after a tool's result, beside whatever answers there are."""
        talk, before = self.talk, self.tree.head
        if before != to:
            talk.show(to)
            yield Rewound()
        async with aclosing(self._answer(talk, to, before)) as events:
            async for event in events:
                yield event

    async def _ask(self, asked: Node) -> AsyncGenerator[SessionEvent, None]:
        talk, before = self.talk, self.tree.head
        if asked.parent != before:
            talk.show(asked.parent)
            yield Rewound()
        self._add(talk, asked)
        if self.recorder is not None and asked.text.strip():
            self.recorder.remember(asked.text)
        yield Begun(asked)
        async with aclosing(self._answer(talk, asked.id, before)) as events:
            async for event in events:
                yield event

    async def _answer(self, talk: Talk, to: str, before: str | None) -> AsyncGenerator[SessionEvent, None]:
        """Answer, by vote where the settings say so; show what was shown `before` where no word came."""
        answering = self._by_vote if talk.settings.samples > 1 else self._by_rounds
        async with aclosing(answering(talk, to, before)) as events:
            async for event in events:
                yield event

    async def _by_vote(self, talk: Talk, to: str, before: str | None) -> AsyncGenerator[SessionEvent, None]:
        """Let several samples decide on an answer. They are offered no tools: there is no voting on what these do."""
        await self._take_engine()
        messages = talk.tree.messages(talk.settings.system, to=to)
        nodes = [Node("assistant", parent=to, model=self.model) for _ in range(talk.settings.samples)]
        self._add(talk, nodes[0])
        samples = Samples(nodes, talk, partial(self._add, talk, shown=False), self._clock)
        self._samples = samples
        if self.state is State.STOPPING:
            samples.stop()
        try:
            yield Begun(nodes[0])
            asked = to_the_end(self.backend.ask(messages, settings=talk.settings), Done)
            async with aclosing(samples.run(asked)) as events:
                async for event in events:
                    if isinstance(event, Failed) and event.error == "EngineError":
                        self.state = State.ASLEEP
                    if isinstance(event, Voted) and talk.tree.head == nodes[0].id:
                        talk.show(event.node.id)
                    yield event
        finally:
            self._samples = None
            if self.state in (State.ANSWERING, State.STOPPING):
                self.state = State.READY
        if samples.silent and talk.tree.head in [node.id for node in nodes]:
            talk.show(before)
            yield Rewound()

    async def _by_rounds(self, talk: Talk, to: str, before: str | None) -> AsyncGenerator[SessionEvent, None]:
        """Answer until no tool is asked for."""
        parent, hearing, silent = to, None, True
        off = self.off
        await self._take_engine()
        # Starting tools takes a while, in which the answer may be stopped.
        await self._tools.ready(off)
        messages = talk.tree.messages(talk.settings.system, to=to)
        rounds = self._rounds = Rounds(messages, self._asked(talk), self._tools, self._approve, off=off)
        try:
            async with aclosing(rounds.run() if self.state is State.ANSWERING else _nothing()) as steps:
                async for step in steps:
                    if isinstance(step, RoundBegins):
                        node = self._add(talk, Node("assistant", parent=parent, model=self.model))
                        hearing = Hearing(talk, node, self._clock)
                        yield Begun(node)
                    elif isinstance(step, CallState):
                        if step.result is not None and hearing is not None:
                            found = Node("tool", step.result.text, parent=talk.tree.head, call_id=step.call.id)
                            parent = self._add(talk, found).id
                            talk.finish(found)
                        yield step
                    elif isinstance(step, RoundsEnd):
                        yield step
                    elif hearing is not None and self._hears(step) and hearing.hear(step):
                        yield step
                        if isinstance(step, Done | Failed):
                            yield Ended(hearing.node, step if isinstance(step, Done) else None)
        finally:
            self._rounds = None
            if hearing is not None:
                hearing.end()
                silent = parent == to and not hearing.node.text.strip() and not hearing.node.calls
            if self.state in (State.ANSWERING, State.STOPPING):
                self.state = State.READY
        if silent and talk.tree.head == (to if hearing is None else hearing.node.id):
            talk.show(before)
            yield Rewound()

    async def go_on(self, node_id: str) -> AsyncGenerator[SessionEvent, None]:
        """Go on with an answer where it ended."""
        talk = self.talk
        node = talk.tree[node_id]
        await self._take_engine()
        if self.state is State.STOPPING:
            self.state = State.READY
            yield Ended(node, None)
            return
        message: Message = {"role": "assistant", "content": node.text}
        if node.thought and not node.text:
            message["thought"] = node.thought
        messages = [*talk.tree.messages(talk.settings.system, to=node.parent), message]
        hearing = Hearing(talk, node, self._clock)
        try:
            async with aclosing(self._asked(talk, continue_last=True)(messages, [])) as events:  # type: ignore[type-var]
                async for event in events:
                    if self._hears(event) and hearing.hear(event):
                        yield event
                        if isinstance(event, Done | Failed):
                            yield Ended(node, event if isinstance(event, Done) else None)
        finally:
            hearing.end()
            if self.state in (State.ANSWERING, State.STOPPING):
                self.state = State.READY

    def _asked(self, talk: Talk, *, continue_last: bool = False) -> Callable[..., AsyncIterator[Event]]:
        """Return what asks the engine under the conversation's settings."""

        def ask(messages: list[Message], tools: list[dict[str, Any]]) -> AsyncIterator[Event]:
            settings = replace(talk.settings, samples=1)
            asked = self.backend.ask(messages, settings=settings, tools=tools, continue_last=continue_last)
            return to_the_end(asked, Done)

        return ask

    def _hears(self, event: Event) -> bool:
        """Follow what the engine does; False for words that come after it was told to stop."""
        if isinstance(event, Done):
            if event.finish_reason != "tools":
                # Calls belong to the answer: nothing else may be asked before it goes on, and it can be stopped.
                self.state = State.READY
        elif isinstance(event, Failed):
            self.state = State.ASLEEP if event.error == "EngineError" else State.READY
        return not (self.state is State.STOPPING and isinstance(event, Text | Thought))

    # Titles

    @property
    def wants_title(self) -> bool:
        """Whether the conversation has something to be named by, and no name."""
        answered = any(node.role == "assistant" and node.text.strip() for node in self.tree.path())
        return self.talk.title is None and self.talk.id is not None and answered and self.state is State.READY

    async def name(self) -> str | None:
        """Let the model name the conversation, unless something more urgent comes; returns the title."""
        talk = self.talk
        if not self.wants_title or self._naming is not None:
            return None
        self._naming = asyncio.get_running_loop().create_future()
        said: list[str] = []
        finished = False
        settings = Settings(
            sampling=Sampling(temperature=0.0),
            max_tokens=TITLE_TOKENS,
            think="off",
            context_shift=talk.settings.context_shift,
        )
        try:
            asked = self.backend.ask(title_question(talk.tree, talk.settings.system), settings=settings)
            async with aclosing(to_the_end(asked, Done)) as events:
                async for event in events:
                    if isinstance(event, Text):
                        said.append(event.text)
                    elif isinstance(event, Done):
                        finished = event.finish_reason != "cancelled"
                    elif isinstance(event, Failed) and event.error == "EngineError" and self.state is State.READY:
                        self.state = State.ASLEEP
        finally:
            self._naming.set_result(None)
            self._naming = None
        if not finished or talk.title is not None:
            return None
        talk.rename(tidy("".join(said), talk.tree))
        return talk.title

    def engage(self) -> None:
        """Hold the engine for an answer that is about to be asked for; asking for it follows."""
        self.state = State.ANSWERING

    async def _take_engine(self) -> None:
        """Have the engine answer, and nothing else; it may have been stopped before it could begin."""
        if self.state is not State.STOPPING:
            self.state = State.ANSWERING
        await self._stop_naming()

    async def _stop_naming(self) -> None:
        if self._naming is not None:
            self.backend.cancel()
            await asyncio.shield(self._naming)

    def _add(self, talk: Talk, node: Node, *, shown: bool = True) -> Node:
        return talk.add(node, self.model, self.adapter, shown=shown)


class Tools(loop.Tools, Protocol):
    """Tools that have to be started: `edger1.tools.Toolbox`."""

    async def ready(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        """Start what was not started yet, and return what `list` does."""


class _NoTools:
    """Where there are no tools."""

    async def ready(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        return ()

    def list(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        return ()

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        raise NotImplementedError(name)


async def _nothing() -> AsyncGenerator[Step, None]:
    return
    yield


async def _nothing_allowed(call: object, tool: object) -> bool:
    return False
