"""The keys and the commands as they are, with a search."""

from __future__ import annotations

from collections.abc import Sequence

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Input, Static

from edger1.tui.keymap import CHAT, ENGINE, EVERYWHERE, Keymap
from edger1.tui.screens.over import Over

HEADS = {CHAT: "In the conversation", EVERYWHERE: "Everywhere", ENGINE: "On the engine's screen"}
KEYS_COLUMN_MAX = 34


class HelpScreen(Over[None]):
    """Lists every command with its keys, and the /commands; typing narrows the list. Esc or F1 closes it."""

    BINDINGS = [  # noqa: RUF012
        Binding("escape,f1", "dismiss", "Close"),
        Binding("up", "scroll(-1)", "Up", show=False),
        Binding("down", "scroll(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
    ]
    DEFAULT_CSS = """
    HelpScreen {
        align: center middle;
        & > VerticalScroll {
            width: 76;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 1;
            border: round $primary;
            background: $surface;
            scrollbar-size-vertical: 1;
        }
        & Input { dock: top; border: none; height: 1; padding: 0; background: $panel; }
        & Static { height: auto; }
    }
    """

    def __init__(self, keymap: Keymap, commands: Sequence[tuple[str, str]] = ()) -> None:
        """`commands` are (what is typed, what it does): ("/save FILE", "write the conversation as Markdown")."""
        super().__init__()
        self._keymap = keymap
        self._commands = commands

    def compose(self) -> ComposeResult:
        """The search above the list."""
        with VerticalScroll(can_focus=False) as box:
            box.border_title = "Keys"
            box.border_subtitle = "Esc closes"
            search = Input(placeholder="Search", compact=True)
            # A blinking cursor is a timer that wakes an idle machine.
            search.cursor_blink = False
            yield search
            yield Static(markup=False)

    def on_mount(self) -> None:
        """Show all."""
        # Closed at once, there is nothing to type into.
        for search in self.query(Input):
            search.focus()
        self._list("")

    @on(Input.Changed)
    def narrow(self, event: Input.Changed) -> None:
        """Show what fits the search."""
        self._list(event.value)

    def action_scroll(self, lines: int) -> None:
        """Scroll the list; the focus stays in the search."""
        self.query_one(VerticalScroll).scroll_relative(y=lines, animate=False)

    def action_page(self, pages: int) -> None:
        """Scroll the list by what is seen of it."""
        scroll = self.query_one(VerticalScroll)
        scroll.scroll_relative(y=pages * max(scroll.size.height - 1, 1), animate=False)

    def _list(self, search: str) -> None:
        words = search.casefold().split()
        parts: list[Content] = []
        for head, rows in self._groups():
            fitting = [row for row in rows if all(word in f"{row[0]} {row[1]}".casefold() for word in words)]
            if fitting:
                parts.append(Content.styled(head, "bold"))
                wide = min(max(len(keys) for keys, _ in rows), KEYS_COLUMN_MAX) + 2
                parts += [Content.assemble((keys.ljust(wide), "$text-primary"), what) for keys, what in fitting]
                parts.append(Content(""))
        shown = Content("\n").join(parts[:-1]) if parts else Content(f'Nothing has "{search}" in it.')
        for text in self.query(Static):
            text.update(shown)

    def _groups(self) -> list[tuple[str, list[tuple[str, str]]]]:
        groups = [
            (head, [(self._keymap.shown(each.id), each.what) for each in self._keymap.commands if each.where == where])
            for where, head in HEADS.items()
        ]
        if self._commands:
            groups.insert(1, ("Typed into the text box", list(self._commands)))
        return groups
