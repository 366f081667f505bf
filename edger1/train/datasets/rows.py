"""What a row of a dataset is, whatever file and format it came from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

THINK, END_THINK = "<think>", "</think>"
"""The markers of a thought in an assistant's content; the template replaces them with the model's own."""


@dataclass(frozen=True)
class Row:
    """One row: a conversation, a plain text, or a prompt.

    An assistant's content that reasons is `<think>thought</think>answer`, whatever markers the file had.
    """

    where: str
    """File and line or row, such as "traces.jsonl, line 12"."""
    messages: list[dict[str, Any]] | None
    """Turns with role and content. Where the kind is "prompt" or "preference", only what comes before the answer."""
    text: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    """Everything else of the row, under its own names. A preference row has `chosen` and `rejected`: lists of turns."""


@dataclass(frozen=True)
class BadRow:
    """A row that is none, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """The rows of a file or folder, how they were understood, and those left out because of `skip_bad`."""

    rows: list[Row]
    kind: str
    """One of `kinds.KINDS`."""
    bad: list[BadRow] = field(default_factory=list)
    """The first of the bad rows, with reasons."""
    bad_count: int = 0
    fields: tuple[str, ...] = ()
    """The columns that the kind was read from, such as ("question", "answer")."""
    markers: dict[str, int] = field(default_factory=dict)
    """How many rows reason, by the markers that their file used."""

    files: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return in a line how the rows were understood, for the plan."""
        read = f"{len(self.rows):,} rows of kind {self.kind} ({', '.join(self.fields)})"
        if self.markers:
            how = ", ".join(f"{count:,} in {name} form" for name, count in self.markers.items())
            read += f", with reasoning: {how}"
        if self.bad_count:
            read += f"; {self.bad_count:,} bad rows left out, the first: {self.bad[0].where}: {self.bad[0].reason}"
        return read

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)
