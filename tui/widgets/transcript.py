"""The conversation on the screen."""

from __future__ import annotations

from textual.containers import VerticalScroll
from textual.widget import Widget


class Transcript(VerticalScroll, can_focus=False):
    """Everything said so far, scrolled to the end until the user scrolls up."""

    DEFAULT_CSS = """
    Transcript {
        height: 1fr;
        padding: 1 0 0 0;
        scrollbar-gutter: stable;
        align: left bottom;
        scrollbar-size-vertical: 1;
        scrollbar-color: $secondary 40%;
        scrollbar-background: $background;
        .-short & { padding-top: 0; }
    }
    """

    async def say(self, *widgets: Widget) -> None:
        """Add to the end, and go there."""
        await self.mount_all(widgets)
        self.anchor()
