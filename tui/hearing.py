"""Takes down one answer as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

from edger1.messages import Done, Event, Failed, Text, Thought, ToolCall
from edger1.tui.tree import Call, Node


class Pages(Protocol):
    """What messages are written into as they grow: `edger1.tui.talk.Talk`."""

    def grow(self, node: Node, text: str = "", thought: str = "") -> None:
        """Add a piece to a message."""

    def finish(self, node: Node) -> None:
        """Note that a message is as it will be."""


class Hearing:
    """Writes what an engine says into a message of a conversation, new or to be gone on with.

    `began` is the clock's time at which it was asked, by default this moment.
    """

    def __init__(self, talk: Pages, node: Node, clock: Callable[[], float], *, began: float | None = None) -> None:
        self.node = node
        self._talk = talk
        self._clock = clock
        self._began = clock() if began is None else began
        self._thought_tokens = thought_tokens(node) if node.thought and not node.text else 0
        self._thought_s = node.thought_s or 0.0
        self._thinking = not node.text
        self._calls: list[Call] = []
        self._ended = False

    def hear(self, event: Event) -> bool:
        """Take an event down. False after the end, which counts once."""
        if self._ended:
            return False
        match event:
            case Thought(text=text):
                self._talk.grow(self.node, thought=text)
            case Text(text=text):
                if self._thinking:
                    self._time()
                self._thinking = False
                self._talk.grow(self.node, text=text)
            case ToolCall(name=name, arguments=arguments, call_id=call_id):
                self._calls.append(Call(call_id, name, arguments))
            case Done() as done:
                self.end(done)
            case Failed():
                self.end()
        return True

    def end(self, done: Done | None = None) -> None:
        """The answer is over, whole or not. May be repeated; the first call counts."""
        if self._ended:
            return
        self._ended = True
        if self._thinking:
            self._time()
        self.node.calls = tuple(self._calls)
        self.node.finish = "failed" if done is None else done.finish_reason
        if done is not None:
            self.node.figures = kept(done)
            if self._thought_tokens and "thought_tokens" in self.node.figures["usage"]:
                self.node.figures["usage"]["thought_tokens"] += self._thought_tokens
        self._talk.finish(self.node)

    def _time(self) -> None:
        if self.node.thought:
            self.node.thought_s = self._thought_s + self._clock() - self._began


def kept(done: Done) -> dict[str, Any]:
    """Return what a message keeps of the end of its answer."""
    return {key: value for key, value in dataclasses.asdict(done).items() if key not in ("id", "votes", "samples")}


def thought_tokens(node: Node) -> int:
    """Return how many tokens a message's thought has; 0 where nobody counted."""
    usage = (node.figures or {}).get("usage")
    count = usage.get("thought_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count > 0 else 0
