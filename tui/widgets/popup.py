"""A list over the conversation, just above the place where the user types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textual import events
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edger1.tui.widgets.options import Options
from edger1.tui.widgets.prompt import Prompt

ROWS_MAX = 50


class Popup(Options, can_focus=False):
    """Shows rows while the focus stays in the text; the keys come from there, and the mouse works as well."""

    DEFAULT_CSS = """
    Popup {
        display: none;
        overlay: screen;
        offset: 0 -100%;
        width: 1fr;
        height: auto;
        max-height: 50vh;
        padding: 0 1;
        border: round $primary;
        border-title-color: $text-primary;
        border-subtitle-color: $text-muted;
        background: $surface;
        text-wrap: nowrap;
        text-overflow: ellipsis;
        scrollbar-size-vertical: 1;
        &.-open { display: block; }
        & > .option-list--option-disabled { color: $text-warning; }
        & > .option-list--option-highlighted { background: $primary 30%; color: $foreground; text-style: bold; }
    }
    """

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(markup=False)
        self.prompt = prompt
        self.values: list[Any] = []

    @property
    def is_open(self) -> bool:
        """Whether it is shown."""
        return self.has_class("-open")

    def show(self, rows: Sequence[tuple[Content, Any]], title: str, foot: str = "") -> None:
        """Show rows, each with what it stands for; the first is chosen."""
        self.values = [value for _, value in rows]
        self.clear_options()
        self.add_options([Option(content) for content, _ in rows])
        self.border_title = Content(title)
        self.foot(foot)
        self.add_class("-open")
        if rows:
            self.highlighted = 0

    def say(self, words: str, title: str) -> None:
        """Show a sentence in place of rows."""
        self.values = []
        self.clear_options()
        self.add_option(Option(Content(words), disabled=True))
        self.border_title = Content(title)
        self.foot("")
        self.add_class("-open")

    def foot(self, text: str) -> None:
        """Show a text on the lower edge."""
        self.border_subtitle = Content(text) if text else None

    def hide(self) -> None:
        """Show nothing."""
        self.remove_class("-open")
        self.values = []

    @property
    def chosen(self) -> Any:
        """What the chosen row stands for; None where there is no row."""
        at = self.highlighted
        return self.values[at] if at is not None and at < len(self.values) else None

    def take_key(self, event: events.Key) -> bool:
        """Move the choice, take it or leave; False for other keys."""
        match event.key:
            case "up" | "ctrl+p":
                self.action_cursor_up()
            case "down" | "ctrl+n":
                self.action_cursor_down()
            case "pageup":
                self.action_page_up()
            case "pagedown":
                self.action_page_down()
            case "escape":
                self.leave()
            case "tab" | "enter" if self.values:
                self.take(event.key)
            case _:
                return False
        return True

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take the row that was clicked."""
        event.stop()
        if self.is_open and self.values:
            self.take("click")
        self.prompt.focus()

    def take(self, key: str) -> None:
        """Do what the chosen row is for; `key` is "tab", "enter" or "click"."""
        raise NotImplementedError

    def leave(self) -> None:
        """Close without taking anything."""
        self.hide()
