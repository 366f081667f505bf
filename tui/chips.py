"""What is attached to the message that is being written, as a row of chips shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from textual.content import Content

from edger1.tui.attaching import estimate_tokens
from edger1.tui.clean import clean
from edger1.tui.tree import Attachment

NAME_CELLS = 28


@dataclass(eq=False)
class Chip:
    """A file, a directory or a pasted text. It is filled once it has been read; undoing brings the same one back."""

    name: str
    attachments: tuple[Attachment, ...] = ()
    path: Path | None = None
    """What is read; None for what was pasted."""
    reading: bool = False
    refused: bool = False
    offer: str | None = None
    """What can be attached of something too large: the user has to choose."""

    @property
    def tokens(self) -> tuple[int, bool]:
        """How many tokens it has, and whether all of them were counted rather than estimated."""
        counts = [each.tokens for each in self.attachments]
        total = sum(
            estimate_tokens(each.text) if count is None else count
            for each, count in zip(self.attachments, counts, strict=True)
        )
        return total, None not in counts

    @property
    def label(self) -> str:
        """Name and tokens."""
        name = clean(self.name)
        if len(name) > NAME_CELLS:
            name = "…" + name[1 - NAME_CELLS :]
        if self.reading:
            return f"{name} reading"
        if self.offer is not None:
            return f"{name} too large"
        many = f" {len(self.attachments)} files" if len(self.attachments) > 1 else ""
        return f"{name}{many} {amount(*self.tokens)}"


def amount(tokens: int, counted: bool) -> str:
    """Return a number of tokens as it is shown: with ~ where it is an estimate."""
    return f"{'' if counted else '~'}{tokens:,}"


def total(chips: Sequence[Chip], context: int | None) -> str:
    """Return the tokens of all that is attached, against the context where it is known."""
    counts = [chip.tokens for chip in chips]
    text = amount(sum(count for count, _ in counts), all(counted for _, counted in counts))
    return f"{text} of {context:,} tokens" if context else f"{text} tokens"


def too_many(chips: Sequence[Chip], context: int | None) -> bool:
    """Return whether the attachments alone fill the context."""
    return context is not None and sum(chip.tokens[0] for chip in chips) >= context


@dataclass(frozen=True)
class Piece:
    """One chip on the row: its cells from `begin` to `end`; the cross that removes it begins at `cross`."""

    index: int
    begin: int
    cross: int
    end: int
    text: str


def lay_out(chips: Sequence[Chip], selected: int, cells: int) -> tuple[list[Piece], int]:
    """Return the chips that a row of `cells` holds, the selected one among them, and how many it does not.

    A single chip that is too wide is cut.
    """
    texts = [f"[{chip.label} ×]" for chip in chips]
    widths = [Content(text).cell_length for text in texts]
    first = 0
    while first < selected and sum(widths[first : selected + 1]) + (selected - first) > cells:
        first += 1
    pieces: list[Piece] = []
    at = 0
    for index in range(first, len(chips)):
        width = min(widths[index], cells) if index == first else widths[index]
        if at + width > cells:
            break
        text = texts[index]
        if width < widths[index]:
            text = Content(text[:-3]).truncate(max(1, width - 3), ellipsis=True).plain + " ×]"
        pieces.append(Piece(index, at, at + width - 2, at + width, text))
        at += width + 1
    return pieces, len(chips) - len(pieces)
