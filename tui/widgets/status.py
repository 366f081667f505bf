"""One line: what the engine does, and what the answer costs, while it runs and after it."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from edger1.messages import Figures, Usage
from edger1.tui.clean import clean
from edger1.tui.figures import SEPARATOR, Field, fields, fit

STATE_ROOM = 9
"""Columns that the state always has, so that figures do not move when "Thinking" becomes "Writing"."""


class Status(Widget):
    """The state at the left, figures at the right: as many whole ones as there is room for."""

    DEFAULT_CSS = """
    Status {
        height: 1;
        padding: 0 2;
        color: $text-muted;
    }
    """

    state: reactive[str] = reactive("")
    held: reactive[Field | None] = reactive(None)
    """What the conversation is held under, where that is not the usual."""
    _fields: reactive[tuple[Field, ...]] = reactive(())

    def show(self, figures: Figures | None, usage: Usage | None = None, *, live: bool = False) -> None:
        """Show an answer's figures, `live` while it runs; None shows none."""
        self._fields = () if figures is None else tuple(fields(figures, usage, live=live))

    def render(self) -> Content:
        """Lay the line out for the width there is."""
        room = self.content_size.width
        state = Content(clean(self.state)).truncate(room, ellipsis=True)
        parts: list[Content | str | tuple[str, str]] = []
        width = 0
        shown = self._fields if self.held is None else (self.held, *self._fields)
        # Words beside words need more between them than words beside figures.
        gap = 1 if self.held is None else 3
        for said, mood in fit(shown, room - max(state.cell_length + gap, STATE_ROOM)):
            if parts:
                parts.append(SEPARATOR)
                width += len(SEPARATOR)
            parts.append((said, f"bold $text-{mood}") if mood else said)
            width += len(said)
        return Content.assemble(state.stylize("$text-primary"), " " * (room - state.cell_length - width), *parts)
