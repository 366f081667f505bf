"""One line above the conversation: what it is called, and who answers."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from edger1.tui.clean import clean


class Heading(Widget):
    """The title at the left, the model at the right; a narrow terminal cuts the title."""

    DEFAULT_CSS = """
    Heading {
        height: 1;
        padding: 0 2;
        color: $text-muted;
        .-short & { display: none; }
    }
    """

    title: reactive[str] = reactive("")
    model: reactive[str] = reactive("")

    def render(self) -> Content:
        """Lay the line out for the width there is."""
        room = self.content_size.width
        model = Content(clean(self.model)).truncate(max(0, room // 2), ellipsis=True)
        left = max(0, room - model.cell_length - 2)
        title = Content(" ".join(clean(self.title).split())).truncate(left, ellipsis=True)
        gap = " " * max(0, room - title.cell_length - model.cell_length)
        return Content.assemble(title, gap, model.stylize("$text-primary"))
