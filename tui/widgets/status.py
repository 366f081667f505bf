"""One line: what the engine does, and what the last answer cost."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget


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
    figures: reactive[tuple[str, ...]] = reactive(())

    def render(self) -> Content:
        """Lay the line out for the width there is."""
        room = self.content_size.width
        figures = list(self.figures)
        while figures and len(self.state) + 3 + len(" · ".join(figures)) > room:
            figures.pop()
        right = " · ".join(figures)
        gap = " " * (room - len(self.state) - len(right))
        return Content.assemble((self.state, "$text-primary"), gap, right)
