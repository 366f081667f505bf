"""Answers with tools: ask, run what the answer calls for, ask again, until an answer calls for nothing.

Knows neither the screen nor the engine: `ask` answers a conversation with the engine's events, `approve` says whether
a call may run. What happens is yielded, so that a conversation can be shown and kept while it grows.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from edger1.messages import Done, Event, Failed, Message, Text, Thought, ToolCall
from edger1.tools.kinds import Call, Result, Tool

ROUNDS = 16
Stage = Literal["waiting", "running", "done", "failed", "refused", "stopped"]
REFUSED = "The user did not allow this call."
STOPPED = "The user stopped this call before it was done."


class Tools(Protocol):
    """What the loop needs of a `Toolbox`."""

    def list(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        """Return the tools that may be called."""

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        """Run one."""


@dataclass(frozen=True)
class RoundBegins:
    """The conversation goes to the model for the `number`th time, from 1."""

    number: int


@dataclass(frozen=True)
class CallState:
    """A call has come to a stage; from "done" on it has its result, which is in the conversation too."""

    call: Call
    stage: Stage
    tool: Tool | None = None
    result: Result | None = None


@dataclass(frozen=True)
class RoundsEnd:
    """The model has used up its rounds and still wants to call tools: the last calls ran and were not answered."""

    rounds: int


Ask = Callable[[list[Message], list[dict[str, Any]]], AsyncIterator[Event]]
Approve = Callable[[Call, Tool], Awaitable[bool]]
Step = Event | RoundBegins | CallState | RoundsEnd


class Rounds:
    """One answer with all its rounds. Iterate over `run` once; `stop` may be called meanwhile.

    `messages` is the conversation so far and grows with each round: the assistant's message with its calls, then a
    message with the result of each, in order, also of a call that was refused, failed or stopped.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        ask: Ask,
        tools: Tools,
        approve: Approve,
        *,
        rounds: int = ROUNDS,
        off: Collection[str] = (),
    ) -> None:
        """`off` holds origins and keys of tools that are not offered, see `Toolbox.list`."""
        self.messages = list(messages)
        self._ask = ask
        self._tools = tools
        self._approve = approve
        self._rounds = rounds
        self._off = off
        self._stopped = False
        self._running: asyncio.Task[Any] | None = None

    def stop(self) -> bool:
        """Stop the call that runs or waits and ask no more; False where no call does. The engine is the caller's."""
        self._stopped = True
        if self._running is None:
            return False
        self._running.cancel()
        return True

    async def run(self) -> AsyncGenerator[Step, None]:
        """Yield the engine's events and the stages of calls.

        Ends after an answer without calls, after one that was cancelled or failed (its calls do not run), after `stop`,
        or with RoundsEnd. Closing the generator stops a call that runs.
        """
        try:
            for number in range(1, self._rounds + 1):
                offered = self._tools.list(self._off)
                yield RoundBegins(number)
                text: list[str] = []
                thought: list[str] = []
                calls: list[Call] = []
                end: Done | Failed | None = None
                answer = self._ask(list(self.messages), [tool.to_openai() for tool in offered])
                async with aclosing(answer) as events:  # type: ignore[type-var]
                    async for event in events:
                        if isinstance(event, Text):
                            text.append(event.text)
                        elif isinstance(event, Thought):
                            thought.append(event.text)
                        elif isinstance(event, ToolCall):
                            calls.append(Call(_id_of(event, calls), event.name, event.arguments))
                        elif isinstance(event, Done | Failed):
                            end = event
                        yield event
                if not calls or not isinstance(end, Done) or end.finish_reason == "cancelled":
                    return
                self.messages.append(_asking("".join(text), "".join(thought), calls))
                async for state in self._run_calls(calls, offered):
                    yield state
                if self._stopped:
                    return
            yield RoundsEnd(self._rounds)
        finally:
            if self._running is not None:
                self._running.cancel()

    async def _run_calls(self, calls: Sequence[Call], offered: Sequence[Tool]) -> AsyncGenerator[CallState, None]:
        """Run the calls of one answer, in order: a later one may rest on what an earlier one did."""
        for call in calls:
            tool = next((each for each in offered if each.name == call.name), None)
            stage: Stage = "stopped"
            result: Result | None = None
            if self._stopped:
                pass
            elif tool is None:
                names = ", ".join(each.name for each in offered[:50]) or "none"
                stage, result = "failed", Result(f"There is no tool {call.name!r}. The tools are: {names}.", True)
            else:
                yield CallState(call, "waiting", tool)
                allowed = await self._stoppable(self._allowed(call, tool))
                if allowed is False:
                    stage, result = "refused", Result(REFUSED, is_error=True)
                elif allowed:
                    yield CallState(call, "running", tool)
                    result = await self._stoppable(self._tools.call(call.name, call.arguments, tool=tool))
                    if result is not None:
                        stage = "failed" if result.is_error else "done"
            result = result or Result(STOPPED, is_error=True)
            self.messages.append({"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result.text})
            yield CallState(call, stage, tool, result)

    async def _allowed(self, call: Call, tool: Tool) -> bool:
        return await self._approve(call, tool) is True

    async def _stoppable(self, work: Any) -> Any:
        """Return what `work` gives, or None where `stop` ended it."""
        if self._stopped:
            work.close()
            return None
        self._running = asyncio.ensure_future(work)
        try:
            await asyncio.wait({self._running})
            return None if self._running.cancelled() else self._running.result()
        finally:
            if not self._running.done():
                self._running.cancel()
            self._running = None


def _id_of(event: ToolCall, before: Sequence[Call]) -> str:
    """Return the engine's id of a call where it gives one that is unique, or else a new one."""
    given = getattr(event, "call_id", "")
    return given if given and all(given != each.id for each in before) else f"call_{uuid.uuid4().hex[:12]}"


def _asking(text: str, thought: str, calls: Sequence[Call]) -> Message:
    """Return the assistant's message with its calls, and the thought that led to them: some families go on from it."""
    asked = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"role": "assistant", "content": text, "tool_calls": asked} | ({"thought": thought} if thought else {})
