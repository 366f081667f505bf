"""What the library's calls take beside a prompt, and what they give back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from edger1.client import Connection, error_of, next_id
from edger1.errors import EdgeR1Error, EngineError
from edger1.messages import Cancel, Done, Event, Failed, Figures, Generate, Text, Thought, ToolCall, Usage


class GenerateOptions(TypedDict, total=False):
    """What `generate`, `stream`, `astream`, `submit` and a chat's `send` take beside the prompt.

    None or a missing value leaves a setting to the model's own defaults. `stop` is a list of strings that end the
    answer and are cut off it. `think` is "auto", "on" or "off" where the model's template can switch its reasoning.
    `raw` gives a string to the model as it stands, without its chat template. `tools` are functions that the model may
    call, each {"type": "function", "function": {"name", "description", "parameters"}} with its parameters as a JSON
    schema. `continue_last` goes on from the end of the last message, an assistant's, and returns only what is new;
    where that has no text but a "thought", from the middle of the thought. `speculate` says where drafts come from:
    "auto", "off", "lookup", "mtp" or "draft". `context_shift` drops the oldest turns, or tokens from the middle, where
    the context is full, and goes on.

    `think_budget` closes the thought after so many tokens, and the answer follows; 0 is no thought. With
    `think_at_least` the thought goes on for so many tokens before it may end ("Wait"). `samples` answers are drawn,
    sample i with the seed + i, and what most of them come to is the answer.
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    think: str
    think_budget: int | None
    think_at_least: int | None
    samples: int
    tools: Sequence[dict[str, Any]]
    schema: Any
    raw: bool
    continue_last: bool
    speculate: str
    context_shift: bool


@dataclass(frozen=True)
class Response:
    """A complete answer. `finish_reason` is "stop", "length", "cancelled", or "tools" where it waits for the results of
    `tool_calls`: say them in messages {"role": "tool", "tool_call_id": ..., "content": ...} behind its own.

    `notes` are sentences on what in it is not as it seems, such as a tool call that could not be read. Where several
    samples were drawn, `samples` are their texts, and `votes` says how many came to each answer, the most first.
    """

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    usage: Usage
    figures: Figures
    notes: tuple[str, ...] = ()
    votes: dict[str, int] = field(default_factory=dict)
    samples: tuple[str, ...] = ()


@dataclass
class Collector:
    """Gathers events into a Response."""

    text: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tool_calls: list[ToolCall] = field(default_factory=list)

    def add(self, event: Event) -> Response | None:
        """Take an event; returns the Response with the last one. Raises the error that a Failed names."""
        if isinstance(event, Text):
            self.text.append(event.text)
        elif isinstance(event, Thought):
            self.thinking.append(event.text)
        elif isinstance(event, ToolCall):
            self.tool_calls.append(event)
        elif isinstance(event, Failed):
            raise error_of(event)
        elif isinstance(event, Done):
            return Response(
                "".join(self.text),
                "".join(self.thinking),
                tuple(self.tool_calls),
                event.finish_reason,
                event.usage,
                event.figures,
                tuple(event.notes),
                event.votes,
                tuple(event.samples),
            )
        return None


class Handle:
    """An answer under way, from `submit`."""

    def __init__(self, connection: Connection, request: Generate) -> None:
        self._connection = connection
        self._id = request.id
        self._done = threading.Event()
        self._collector = Collector()
        self._response: Response | None = None
        self._error: EdgeR1Error | None = None
        connection.submit(request, self._on_event)

    def _on_event(self, event: Event) -> None:
        try:
            self._response = self._collector.add(event)
        except EdgeR1Error as error:
            self._error = error
        except Exception as error:
            self._error = EngineError(f"The answer could not be put together ({type(error).__name__}: {error}).")
        if self._response is not None or self._error is not None:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether the answer is complete, cancelled or failed."""
        return self._done.is_set()

    def cancel(self) -> None:
        """Stop within one token; `result` then returns what was said, with finish_reason "cancelled"."""
        self._connection.send(Cancel(next_id(), self._id))

    def result(self, timeout_s: float | None = None) -> Response:
        """Wait for the answer. Raises TimeoutError after `timeout_s` seconds; the answer goes on."""
        if not self._done.wait(timeout_s):
            raise TimeoutError(f"No complete answer within {timeout_s} s; it goes on, and cancel() stops it.")
        if self._error is not None:
            raise self._error
        assert self._response is not None
        return self._response
