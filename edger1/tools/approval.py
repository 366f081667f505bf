"""Which calls may run: only those that the user allowed, once, for the conversation or always.

What is allowed is a tool, named by its origin and its own name, as it described itself when the user said so: the key
ends in a fingerprint of description, schema and what is run, so that a tool that has changed since is asked about anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Literal, Protocol

from edger1.tools.kinds import Call, Tool

Answer = Literal["once", "conversation", "always", "no"]
Question = Callable[[Call, Tool], Awaitable[Answer]]


class Memory(Protocol):
    """Keeps the keys of what is always allowed."""

    def approvals(self) -> set[str]:
        """Return all of them."""

    def approve_always(self, key: str) -> None:
        """Keep one."""

    def forget_approval(self, key: str) -> None:
        """Keep one no longer; one that is not there is no error."""


def approval_key(tool: Tool) -> str:
    """Return what "always" is remembered under: origin, own name and fingerprint."""
    return f"{tool.key}#{tool.fingerprint}"


class Approvals:
    """The decisions of one conversation, and those that hold for all of them."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._here: set[str] = set()

    def allowed(self, tool: Tool) -> Literal["conversation", "always"] | None:
        """Return how far a call of this tool is allowed already; None: the user has to be asked."""
        key = approval_key(tool)
        if key in self._memory.approvals():
            return "always"
        return "conversation" if key in self._here else None

    def changed(self, tool: Tool) -> bool:
        """Return whether the tool was allowed always, but has changed since."""
        known = {key.rpartition("#")[0] for key in self._memory.approvals()}
        return self.allowed(tool) is None and tool.key in known

    def decide(self, tool: Tool, answer: Answer) -> bool:
        """Remember an answer as far as it reaches, and return whether the call may run."""
        if answer == "conversation":
            self._here.add(approval_key(tool))
        elif answer == "always":
            self._memory.approve_always(approval_key(tool))
        return answer in ("once", "conversation", "always")

    async def approve(self, call: Call, tool: Tool, ask: Question) -> bool:
        """Return whether a call may run, asking where nothing allows it yet."""
        return self.allowed(tool) is not None or self.decide(tool, await ask(call, tool))

    def forget(self, tool: Tool) -> None:
        """Ask about a tool again, whatever was allowed before; older forms of it are forgotten too."""
        here = {key for key in self._here if key.rpartition("#")[0] == tool.key}
        self._here -= here
        for key in self._memory.approvals():
            if key.rpartition("#")[0] == tool.key:
                self._memory.forget_approval(key)

    def forget_conversation(self) -> None:
        """Another conversation begins: what was allowed for the one before holds no longer."""
        self._here.clear()

    def forget_all(self) -> None:
        """Ask about every tool again, in this conversation and all others."""
        self._here.clear()
        for key in self._memory.approvals():
            self._memory.forget_approval(key)
