"""A box to type in, on a screen of any width."""

from __future__ import annotations

from textual.strip import Strip
from textual.widgets import TextArea


class TextBox(TextArea):
    """Textual's text box; where it has no column at all, it does not wrap what stands in it while it is empty."""

    def render_line(self, y: int) -> Strip:
        """Draw a row."""
        return super().render_line(y) if self.content_size.width > 0 else Strip.blank(self.size.width)
