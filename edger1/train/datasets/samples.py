"""Rows as a reader should see them before training: which of the text is learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edger1.train.datasets.rendering import Piece
from edger1.train.datasets.rows import Row

if TYPE_CHECKING:
    from rich.text import Text

_MOST = 1200


def chosen_rows(rows: Sequence[Row], count: int) -> list[Row]:
    """Return `count` rows, evenly spread."""
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def marked(pieces: Sequence[Piece], *, most: int = _MOST) -> Text:
    """Return a rendered row: what is learned bold, what is not dim; the middle of pieces left out above `most`."""
    from rich.text import Text

    text = Text()
    share = most // max(1, len(pieces))
    for piece in pieces:
        shown = _shortened(piece.text, max(share, 80))
        text.append(shown, style="bold green" if piece.counted else "dim")
    return text


def plain(row: Row, *, most: int = _MOST) -> Text:
    """Return a row as it was read, without a model's template."""
    from rich.text import Text

    if row.messages is None:
        return Text(_shortened(row.text or "", most))
    text = Text()
    sides = [(name, row.columns[name]) for name in ("chosen", "rejected") if isinstance(row.columns.get(name), list)]
    turns = [*row.messages, *({**turn, "role": name} for name, answer in sides for turn in answer)]
    for turn in turns:
        text.append(f"{turn['role']}: ", style="bold")
        text.append(_shortened(turn["content"], max(80, most // len(turns))) + "\n")
    return text


def _shortened(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    left_out = len(text) - most
    return f"{text[: most // 2]} [... {left_out:,} characters ...] {text[len(text) - (most - most // 2) :]}"
