"""A list to choose from, on a screen of any height."""

from __future__ import annotations

from textual.widgets import OptionList


class Options(OptionList):
    """Textual's list; where it has no row at all, a page of it is nothing to move by, and no error."""

    def action_page_up(self) -> None:
        """Move a page up."""
        if self.scrollable_content_region:
            super().action_page_up()

    def action_page_down(self) -> None:
        """Move a page down."""
        if self.scrollable_content_region:
            super().action_page_down()
