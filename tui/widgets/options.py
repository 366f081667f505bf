"""A list to choose from, on a screen of any height."""

from __future__ import annotations

from textual.geometry import Size
from textual.widgets import OptionList


class Options(OptionList):
    """Textual's list; where it has no row at all, a page of it is nothing to move by, and no error."""

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """Rows of all lines at a width; none where there is no column to wrap them into."""
        return super().get_content_height(container, viewport, width) if width > 0 else 0

    def action_page_up(self) -> None:
        """Move a page up."""
        if self.scrollable_content_region:
            super().action_page_up()

    def action_page_down(self) -> None:
        """Move a page down."""
        if self.scrollable_content_region:
            super().action_page_down()
