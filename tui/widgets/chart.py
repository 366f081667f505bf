"""A small chart of a figure over time, on a scale that does not depend on what is shown.

Textual's own Sparkline stretches from the least to the greatest value, which would make a memory that stays the same
look like one that jumps.
"""

from __future__ import annotations

from collections.abc import Sequence

from textual.content import Content
from textual.widget import Widget

BARS = " ▁▂▃▄▅▆▇█"
LABEL_WIDTH = 9
VALUE_WIDTH = 22


def columns(values: Sequence[float | None], width: int) -> list[float | None]:
    """Return at most `width` values: those that there are, or means of neighbours."""
    if len(values) <= width:
        return list(values)
    found: list[float | None] = []
    for at in range(width):
        part = [
            each for each in values[at * len(values) // width : (at + 1) * len(values) // width] if each is not None
        ]
        found.append(sum(part) / len(part) if part else None)
    return found


def bars(values: Sequence[float | None], most: float, height: int) -> list[str]:
    """Draw values from 0 to `most` as lines of bars, the highest line first; a value above 0 is always seen."""
    full = len(BARS) - 1
    levels = [
        0 if not value or most <= 0 else max(1, min(round(value / most * height * full), height * full))
        for value in values
    ]
    return [
        "".join(BARS[max(0, min(level - row * full, full))] for level in levels) for row in range(height - 1, -1, -1)
    ]


class Chart(Widget):
    """A name, the bars, and the figure as it is; without bars where `plain`."""

    DEFAULT_CSS = """
    Chart { height: 1; width: 1fr; color: $text-muted; }
    """

    def __init__(self, label: str, *, plain: bool = False, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self._label = label
        self._plain = plain
        self._values: Sequence[float | None] = ()
        self._most = 1.0
        self._said = ""

    def show(self, values: Sequence[float | None], most: float, said: str) -> None:
        """Show values on a scale from 0 to `most`, and the latest in words."""
        self._values, self._most, self._said = values, most, said
        self.refresh()

    def render(self) -> Content:
        """Draw it for the room there is."""
        width, height = self.content_size
        if self._plain:
            return Content(f"{self._label}: {self._said}")
        room = max(width - LABEL_WIDTH - VALUE_WIDTH, 0)
        drawn = bars(columns(self._values, room), self._most, max(height, 1))
        lines = []
        for at, row in enumerate(drawn):
            last = at == len(drawn) - 1
            label = self._label if last else ""
            said = self._said if last else ""
            lines.append(
                Content.assemble(label.ljust(LABEL_WIDTH), (row.ljust(room), "$primary"), said.rjust(VALUE_WIDTH))
            )
        return Content("\n").join(lines)
