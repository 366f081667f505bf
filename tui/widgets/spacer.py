"""Room for messages that are not mounted."""

from __future__ import annotations

from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget


class Spacer(Widget):
    """As high as the messages that it stands for, so that the scroll bar tells the truth; draws nothing."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    Spacer { width: 1fr; height: 0; }
    """

    def render_line(self, y: int) -> Strip:
        """An empty row; only rows that are seen are asked for."""
        return Strip.blank(self.content_size.width, self.rich_style)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Nothing here was said by anybody."""
        return None
