"""Ctrl+R: find what was typed before."""

from __future__ import annotations

from textual import events
from textual.content import Content

from edger1.tui.clean import clean
from edger1.tui.recall import matches
from edger1.tui.widgets.popup import ROWS_MAX, Popup


class HistorySearch(Popup):
    """Lists what has all the words in it, latest first. The draft stays as it is until something is taken."""

    _words = ""
    _draft = ""

    def begin(self) -> None:
        """Open, with everything listed."""
        self._words, self._draft = "", self.prompt.text
        self._list()

    def follow(self) -> None:
        """A change of the text ends the search."""
        if self.is_open and self.prompt.text != self._draft:
            self.hide()

    def take_key(self, event: events.Key) -> bool:
        """Letters go into the search; Ctrl+R goes to the next."""
        if event.key == "ctrl+r":
            self.action_cursor_down()
        elif event.key == "backspace":
            self._words = self._words[:-1]
            self._list()
        elif event.is_printable and event.character:
            self._words += event.character
            self._list()
        elif event.key in ("tab", "enter") and not self.values:
            self.hide()
        else:
            return super().take_key(event)
        return True

    def _list(self) -> None:
        title = f"Search: {clean(self._words)}▏"
        found = matches(self.prompt.past, self._words, ROWS_MAX)
        if found:
            self.show(
                [(Content(clean(" ⏎ ".join(text.splitlines()))), text) for text in found], title, "⏎ take · esc leave"
            )
        else:
            self.say("Nothing you sent has that." if self.prompt.past else "You have sent nothing yet.", title)

    def take(self, key: str) -> None:
        """Put what was found in the place of the draft; undoing brings the draft back."""
        text = self.chosen
        self.hide()
        self.prompt.replace_all(clean(text))
