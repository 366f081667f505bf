"""A conversation as a tree of messages: what was said never changes, and every other way to go on is a branch.

A message is a `Node`; the alternatives to it are the other children of its parent. Editing a message and asking for
another answer both add a sibling. `head` is the last message of the branch that is shown. Nothing here knows of the
screen, the disk or the engine.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from edger1.messages import Message

Role = Literal["user", "assistant", "tool"]


def new_id() -> str:
    """Return an id that no other window, import or machine gives out: a UUID of 32 hex digits."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Attachment:
    """A text that goes with a user's message: a file's, or what was pasted."""

    name: str
    text: str
    path: str | None = None
    tokens: int | None = None
    """Tokens of the model that was loaded when it was attached; None where nobody counted."""


@dataclass(frozen=True)
class Call:
    """A tool that the model wants to use. `id` joins it to the "tool" message with its result."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Node:
    """One message. Only `text`, `thought`, `thought_s`, `finish`, `figures` and `calls` change, while it is written."""

    role: Role
    text: str = ""
    id: str = field(default_factory=new_id)
    parent: str | None = None
    created_at: float = field(default_factory=time.time)
    """Unix seconds."""
    thought: str = ""
    thought_s: float | None = None
    """Seconds that the thought took."""
    model: str | None = None
    """Who answered, as the user calls it."""
    finish: str | None = None
    """How an answer ended: "stop", "length", "cancelled", "failed", "tools" (it waits for their results), "edited" (the
    user wrote it). None: it is being written, or the program died while it was."""
    figures: dict[str, Any] | None = None
    """`edger1.messages.Done` without its id, as `dataclasses.asdict` gives it. One of several samples that has voted
    has "vote" too: {"answer": its own, "tally": [[answer, how many gave it], ...], "voters": [id of each]}."""
    attachments: tuple[Attachment, ...] = ()
    calls: tuple[Call, ...] = ()
    call_id: str | None = None
    """Of a tool's message: which call it answers."""


class Tree:
    """The messages of one conversation and the branch that is shown."""

    def __init__(self, nodes: Iterable[Node] = (), head: str | None = None) -> None:
        self._nodes: dict[str, Node] = {}
        self._children: dict[str | None, list[str]] = {}
        for node in nodes:
            self._insert(node)
        self.head = head if head in self._nodes else None
        if self.head is None and self._nodes:
            self.head = self.deepest(next(reversed(self._nodes)))

    def __contains__(self, id_: object) -> bool:
        return id_ in self._nodes

    def __getitem__(self, id_: str) -> Node:
        return self._nodes[id_]

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        """All messages of all branches in the order they came: a parent before what follows it."""
        return iter(list(self._nodes.values()))

    def add(self, node: Node) -> Node:
        """Add a message below its parent and show it. Raises KeyError where the parent is not there."""
        self._insert(node)
        self.head = node.id
        return node

    def _insert(self, node: Node) -> None:
        if node.parent is not None and node.parent not in self._nodes:
            raise KeyError(node.parent)
        if node.id not in self._nodes:
            self._children.setdefault(node.parent, []).append(node.id)
        self._nodes[node.id] = node

    def path(self, to: str | None = None) -> list[Node]:
        """Return the messages from the first one to `to`, by default to the head."""
        path = []
        at = to if to is not None else self.head
        while at is not None:
            node = self._nodes[at]
            path.append(node)
            at = node.parent
        return path[::-1]

    def siblings(self, id_: str) -> list[Node]:
        """Return the alternatives to a message in the order they came, itself among them."""
        return [self._nodes[each] for each in self._children[self._nodes[id_].parent]]

    def switch(self, id_: str, step: int) -> bool:
        """Show the alternative `step` further, round and round, and the latest below it; False: there is none."""
        siblings = self.siblings(id_)
        if len(siblings) < 2:
            return False
        at = next(i for i, node in enumerate(siblings) if node.id == id_)
        self.head = self.deepest(siblings[(at + step) % len(siblings)].id)
        return True

    def deepest(self, id_: str) -> str:
        """Return the last message below `id_`, following the latest child each time."""
        while children := self._children.get(id_):
            id_ = children[-1]
        return id_

    def messages(self, system: str | None = None, to: str | None = None) -> list[Message]:
        """Return the shown branch in the form that the engine takes.

        Thoughts are no part of it, as the templates of reasoning models leave them out. A question without an answer is
        left out unless it is the last message, because templates commonly refuse two user messages in a row.
        Attachments stand before the text of their message.
        """
        messages: list[Message] = [{"role": "system", "content": system}] if system else []
        path = [node for node in self.path(to) if node.role != "assistant" or node.text.strip() or node.calls]
        for node, after in zip(path, [*path[1:], None], strict=True):
            if node.role == "user" and after is not None and after.role == "user":
                continue
            messages.append(as_message(node))
        return messages


def as_message(node: Node) -> Message:
    """Return one message in the form that the engine takes."""
    message: Message = {"role": node.role, "content": said(node)}
    if node.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in node.calls
        ]
    if node.call_id is not None:
        message["tool_call_id"] = node.call_id
    return message


def said(node: Node) -> str:
    """Return a message's text with its attachments in front."""
    return "".join(_quoted(each) for each in node.attachments) + node.text


def _quoted(attachment: Attachment) -> str:
    """Return an attachment in a fence that nothing in it can end."""
    runs = [len(run) for run in re.findall("`{3,}", attachment.text)]
    fence = "`" * (max(runs, default=2) + 1)
    return f"{attachment.name}:\n\n{fence}\n{attachment.text.rstrip()}\n{fence}\n\n"
