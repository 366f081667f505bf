"""What the store hands out."""

from __future__ import annotations

from dataclasses import dataclass, field

from edger1.tui.settings import Settings
from edger1.tui.tree import Tree


@dataclass(frozen=True)
class Stored:
    """A whole conversation. Times are Unix seconds; `title` None: nobody named it."""

    id: str
    title: str | None
    tree: Tree
    settings: Settings = field(default_factory=Settings)
    model: str | None = None
    adapter: str | None = None
    pinned: bool = False
    created_at: float = 0.0
    updated_at: float = 0.0


@dataclass(frozen=True)
class Summary:
    """One conversation in a list."""

    id: str
    title: str | None
    model: str | None
    pinned: bool
    updated_at: float
    message_count: int
    begins: str = ""
    """The first characters of what was asked first, to show where there is no title."""

    @property
    def name(self) -> str:
        """What to call it: its title, else how it begins."""
        return self.title or self.begins or "Empty conversation"


@dataclass(frozen=True)
class Hit:
    """A place where all the words that were searched for stand: a message, or a title where `node` is None."""

    conversation: str
    title: str
    """The conversation's title, or how it begins."""
    node: str | None
    role: str
    """The message's role; "title" where `node` is None."""
    snippet: str
    """One line of text around the words, without control characters."""
    marks: list[tuple[int, int]]
    """Where in the snippet the words stand: begin and end, in order, none over another."""
    at: float
    """When the message was written, or the titled conversation was last changed."""
