"""Where the user types, with all that helps."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical

from edger1.tui.widgets.attachment_row import AttachmentRow
from edger1.tui.widgets.completion import Completion
from edger1.tui.widgets.file_picker import FilePicker
from edger1.tui.widgets.history_search import HistorySearch
from edger1.tui.widgets.prompt import Prompt


class PromptArea(Vertical):
    """The text box, the row of attachments above it, and the lists that open over the conversation.

    Everything is said and done through `prompt`; its messages come up from here.
    """

    DEFAULT_CSS = """
    PromptArea { height: auto; width: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.prompt = Prompt()
        self._search = HistorySearch(self.prompt)
        self._files = FilePicker(self.prompt)
        self._completion = Completion(self.prompt)
        self._row = AttachmentRow(self.prompt)
        self.prompt.assists = (self._search, self._files, self._completion)
        # A call and not a message: the letters that follow are for the search.
        self.prompt.begin_search = self._search_history

    def compose(self) -> ComposeResult:
        """Lists first: they open upwards from the top."""
        yield self._search
        yield self._files
        yield self._completion
        yield self._row
        yield self.prompt

    @on(Prompt.AttachmentsWanted)
    def _to_the_row(self, event: Prompt.AttachmentsWanted) -> None:
        event.stop()
        self._row.focus()

    def _search_history(self) -> None:
        self._files.hide()
        self._completion.hide()
        self._search.begin()
