"""The conversations: by day, to search, open, rename, pin, delete, export and bring in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option

from edger1.errors import EdgeR1Error
from edger1.tui.clean import clean
from edger1.tui.screens.conversation_rows import grouped, heading_row, hit_row, summary_row
from edger1.tui.screens.over import Over
from edger1.tui.store import Hit, Store, Summary
from edger1.tui.store.export import named, suggested_name, write
from edger1.tui.store.imports import bring_in
from edger1.tui.widgets.options import Options

DEBOUNCE_S = 0.12
"""How long after the last key a search begins."""
NOTHING = "Nothing found."
SHOWN = 500
"""Conversations in the list; those before them are found by searching."""


class Choice(NamedTuple):
    """What to open: a conversation, at one of its messages or at its end; `conversation` None: begin a new one."""

    conversation: str | None
    node: str | None = None


class ConversationsScreen(Over[Choice | None]):
    """Lists conversations and what a search finds. Typing searches; the arrow keys move; Enter opens.

    Returns a `Choice`, or None where nothing is to change. `current` is the conversation that is open, if any.
    """

    BINDINGS = [  # noqa: RUF012
        Binding("escape", "back", "Close", show=False),
        Binding("up", "move(-1)", "Up", show=False),
        Binding("down", "move(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("ctrl+home", "edge(-1)", "First", show=False),
        Binding("ctrl+end", "edge(1)", "Last", show=False),
        # Before the text box's own keys of the same name.
        Binding("ctrl+n", "new", "New", priority=True),
        Binding("ctrl+r", "rename", "Rename", priority=True),
        Binding("ctrl+s", "pin", "Pin", priority=True),
        Binding("ctrl+d", "delete", "Delete", priority=True),
        Binding("ctrl+z", "undo", "Undo", priority=True),
        Binding("ctrl+e", "export", "Export", priority=True),
        Binding("ctrl+o", "import", "Import", priority=True),
    ]
    DEFAULT_CSS = """
    ConversationsScreen {
        align: center middle;
        & > Vertical {
            width: 100%;
            max-width: 110;
            height: 100%;
            max-height: 44;
            border: round $primary;
            background: $background;
        }
        & Input { height: 1; border: none; padding: 0 1; background: $surface; &:focus { border: none; } }
        & #line { display: none; }
        & #line.-asked { display: block; }
        & #what { display: none; padding: 0 1; color: $text-primary; text-style: bold; height: 1; }
        & #what.-asked { display: block; }
        & OptionList {
            height: 1fr;
            border: none;
            padding: 0;
            margin: 1 0;
            background: $background;
            text-wrap: nowrap;
            text-overflow: ellipsis;
            scrollbar-size-vertical: 1;
            & > .option-list--option { padding: 0 1; }
            & > .option-list--option-disabled { color: $text-muted; }
            & > .option-list--option-highlighted, &:focus > .option-list--option-highlighted {
                background: $primary 30%;
                color: $foreground;
                text-style: bold;
            }
            &:ansi > .option-list--option-highlighted { text-style: reverse; }
        }
        &.-short OptionList { margin: 0; }
        & #said { height: auto; max-height: 3; padding: 0 1; color: $text-muted; &.-error { color: $text-error; } }
        & Footer { background: $background; }
        & Footer FooterKey { background: $background; color: $text-muted; }
        & Footer FooterKey .footer-key--key { background: $background; color: $text-primary; }
    }
    """

    def __init__(
        self,
        store: Store,
        current: str | None = None,
        *,
        search: str = "",
        now: Callable[[], datetime] | None = None,
    ) -> None:
        """`current` is the conversation that is open, `search` what is searched for at first."""
        super().__init__()
        self._words = search
        self._store = store
        self._current = current
        self._now = now or (lambda: datetime.now().astimezone())
        self._rows: list[Summary | Hit | None] = []
        """What each option of the list is; None: a heading."""
        self._headings: list[str] = []
        self._summaries: list[Summary] = []
        self._deleted: list[Summary] = []
        self._timer: Timer | None = None
        self._shown_for: str | None = None
        """The words that the rows were found by, "" for the whole list; None before there are any rows."""
        self._asking: Callable[[str], Any] | None = None
        self._busy = False
        self._said = ""
        self._confirmed: Path | None = None
        """The file that may be written over, because Enter was pressed on it before."""

    def compose(self) -> ComposeResult:
        """The words to search for, the list, a line for names and paths, and what happened."""
        with Vertical() as box:
            box.border_title = "Conversations"
            box.border_subtitle = "Enter opens, Esc closes"
            yield Input(self._words, placeholder="Type to search titles, messages and thoughts", id="search")
            yield Options(markup=False)
            yield Static("", id="what", markup=False)
            yield Input(id="line", select_on_focus=False)
            yield Static("", id="said", markup=False)
            yield Footer(show_command_palette=False, compact=True)

    async def on_mount(self) -> None:
        """Show the list; the search box has the keys all the time."""
        for box in self.query(Input):
            box.cursor_blink = False
        self._options.can_focus = False
        self._search.focus()
        self._say(" ".join(self._store.notices) if self._store.read_only or self._store.in_memory else "")
        await self._reload()

    # What the user does

    @on(Input.Changed, "#search")
    def search_soon(self) -> None:
        """Search once the typing rests."""
        if self._timer is not None:
            self._timer.stop()
        self._timer = self.set_timer(DEBOUNCE_S, self._search_now)

    @on(Input.Submitted, "#search")
    async def open_row(self) -> None:
        """Open what is highlighted, of what the words that stand there find."""
        if self._timer is not None:
            self._timer.stop()
            self._timer = None
        if self._search.value != self._shown_for:
            await self._find(self._search.value)
        self._open(self._highlighted)

    @on(OptionList.OptionSelected)
    def open_clicked(self, event: OptionList.OptionSelected) -> None:
        """Open what was clicked."""
        self._open(self._rows[event.option_index])

    @on(Input.Submitted, "#line")
    def answer(self, event: Input.Submitted) -> None:
        """Take the name or path that was asked for; a large file may take a while, and the keys go on meanwhile."""
        if self._asking is not None and not self._busy:
            self.run_worker(self._answer(self._asking, event.value), group="line")

    def on_resize(self, event: events.Resize) -> None:
        """Lay the rows out anew."""
        if self._shown_for is not None:
            self._show(list(self._rows) if self._shown_for.strip() else self._rows_of_list())

    def action_new(self) -> None:
        """Begin a new conversation."""
        self.dismiss(Choice(None))

    def action_back(self) -> None:
        """Leave the line, else the search, else the screen."""
        if self._asking is not None:
            self._end_line()
        elif self._search.value:
            self._search.value = ""
        else:
            self.dismiss(None)

    def action_move(self, step: int) -> None:
        """Move one row up (-1) or down (1)."""
        if step < 0:
            self._options.action_cursor_up()
        else:
            self._options.action_cursor_down()

    def action_page(self, step: int) -> None:
        """Move a page up (-1) or down (1)."""
        if step < 0:
            self._options.action_page_up()
        else:
            self._options.action_page_down()

    def action_edge(self, step: int) -> None:
        """Move to the first (-1) or last (1) row."""
        if step < 0:
            self._options.action_first()
        else:
            self._options.action_last()

    def action_rename(self) -> None:
        """Ask for a name."""
        found = self._summary
        if found is None:
            return

        async def rename(name: str) -> None:
            if await self._done(self._store.rename, found.id, name):
                self._end_line()
                await self._reload(found.id)

        self._ask("Name", found.title or "", rename)

    async def action_pin(self) -> None:
        """Keep a conversation on top, or no longer."""
        found = self._summary
        if found is not None and await self._done(self._store.pin, found.id, not found.pinned):
            await self._reload(found.id)

    async def action_delete(self) -> None:
        """Delete a conversation; it can be had back."""
        found = self._summary
        if found is None:
            return
        at = self._options.highlighted
        if await self._done(self._store.delete, found.id):
            self._deleted.append(found)
            self.refresh_bindings()
            await self._reload(at=at)
            self._say(f"Deleted “{_short(found.name)}”. Ctrl+Z brings it back.")

    async def action_undo(self) -> None:
        """Bring back what was deleted last."""
        if self._deleted and await self._done(self._store.undelete, self._deleted[-1].id):
            found = self._deleted.pop()
            self.refresh_bindings()
            await self._reload(found.id)
            self._say(f"“{_short(found.name)}” is back.")

    def action_export(self) -> None:
        """Ask for a file and write the conversation there."""
        found = self._summary
        if found is None:
            return
        self._confirmed = None

        async def export(name: str) -> None:
            path = await self._done(named, name)
            if path is False:
                return
            written = await self._done(self._export, found.id, path)
            if written == "there":
                self._confirmed = path
                self._say(f"Enter once more writes over {path}, which is there already.")
            elif written:
                self._end_line()
                self._say(f"Written to {path.absolute()}.")

        self._ask("Export to (.md or .json)", suggested_name(found.name), export)

    def action_import(self) -> None:
        """Ask for a file and bring its conversations in."""

        async def bring(name: str) -> None:
            self._say("Reading")
            found = await self._done(lambda: bring_in(self._store, named(name)))
            if found:
                self._end_line()
                await self._reload()
                self._say(f"{found}.")

        self._ask("Import ChatGPT's export, llm's logs.db or EdgeR1's JSON", "", bring)

    # Below

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer to undo only where something was deleted, and no second question while one is asked."""
        if action == "undo" and not self._deleted:
            return False
        if action in ("rename", "pin", "delete", "export", "import") and self._asking is not None:
            return False
        return super().check_action(action, parameters)

    @property
    def _options(self) -> OptionList:
        return self.query_one(OptionList)

    @property
    def _search(self) -> Input:
        return self.query_one("#search", Input)

    @property
    def _highlighted(self) -> Summary | Hit | None:
        at = self._options.highlighted
        return self._rows[at] if at is not None and at < len(self._rows) else None

    @property
    def _summary(self) -> Summary | None:
        """The conversation that is highlighted, also as one in which something was found."""
        match self._highlighted:
            case Summary() as summary:
                return summary
            case Hit(conversation=id_):
                return next((each for each in self._summaries if each.id == id_), None)
        return None

    def _open(self, row: Summary | Hit | None) -> None:
        match row:
            case Summary(id=id_):
                self.dismiss(Choice(id_))
            case Hit(conversation=id_, node=node):
                self.dismiss(Choice(id_, node))

    def _export(self, id_: str, path: Path) -> str:
        if os.path.lexists(path) and path != self._confirmed:
            return "there"
        write(self._store.load(id_), path, over=True)
        return "written"

    async def _done(self, work: Callable[..., Any], *given: Any) -> Any:
        """Do something with the disk, not in the screen's thread; what goes wrong is said, and gives False."""
        try:
            result = await asyncio.to_thread(work, *given)
        except EdgeR1Error as error:
            if self.whole:
                self._say(str(error), error=True)
            return False
        if not self.whole:
            return False
        return True if result is None else result

    async def _answer(self, then: Callable[[str], Any], value: str) -> None:
        self._busy = True
        try:
            await then(value)
        finally:
            self._busy = False

    async def _reload(self, highlight: str | None = None, at: int | None = None) -> None:
        """Read the list anew, then what is searched for, and highlight a conversation or a row."""
        found = await self._done(self._store.list)
        self._summaries = found if isinstance(found, list) else []
        await self._find(self._search.value)
        self._highlight(highlight, at)

    def _search_now(self) -> None:
        self._timer = None
        self.run_worker(self._find(self._search.value), group="search", exclusive=True)

    async def _find(self, words: str) -> None:
        if not words.strip():
            self._shown_for = words
            if self._said == NOTHING:
                self._say("")
            self._show(self._rows_of_list())
            self._highlight(None, None)
            return
        found = await self._done(self._store.search, words)
        if words != self._search.value or not self.whole:
            return
        hits: list[Summary | Hit | None] = list(found) if isinstance(found, list) else []
        self._shown_for = words
        self._show(hits)
        self._highlight(None, None)
        if found is not False:
            self._say("" if hits else NOTHING)

    def _rows_of_list(self) -> list[Summary | Hit | None]:
        rows: list[Summary | Hit | None] = []
        self._headings = []
        for title, group in grouped(self._summaries[:SHOWN], self._now()):
            self._headings.append(title)
            rows += [None, *group]
        return rows

    def _show(self, rows: list[Summary | Hit | None]) -> None:
        now, width = self._now(), max(self._options.scrollable_content_region.width - 2, 10)
        headings = iter(self._headings)
        options = []
        for row in rows:
            match row:
                case None:
                    options.append(Option(heading_row(next(headings)), disabled=True))
                case Summary():
                    options.append(Option(summary_row(row, width, now)))
                case Hit():
                    options.append(Option(hit_row(row, width, now)))
        before = self._options.highlighted
        self._rows = rows
        self._options.set_options(options)
        if before is not None and before < len(rows) and rows[before] is not None:
            self._options.highlighted = before
        more = len(self._summaries) - SHOWN
        if self._said:
            return
        if not self._summaries:
            self._say("No conversations yet. Ctrl+O brings in those of ChatGPT or llm.")
        elif more > 0 and rows and not isinstance(rows[0], Hit):
            self._say(f"{more:,} older ones are not listed; type to find them.")

    def _highlight(self, id_: str | None, at: int | None) -> None:
        """Highlight a conversation, else the row at or before `at`, else the one that is open, else the first."""
        wanted = [i for i, row in enumerate(self._rows) if row is not None]
        if not wanted:
            return
        ids = {row.id: i for i, row in enumerate(self._rows) if isinstance(row, Summary)}
        if id_ in ids:
            self._options.highlighted = ids[id_]
        elif at is not None:
            self._options.highlighted = min((i for i in wanted if i >= at), default=wanted[-1])
        else:
            self._options.highlighted = ids.get(self._current or "", wanted[0])

    def _ask(self, what: str, value: str, then: Callable[[str], Any]) -> None:
        self._asking = then
        self.refresh_bindings()
        label, line = self.query_one("#what", Static), self.query_one("#line", Input)
        label.update(Content(what))
        line.value = clean(value).replace("\n", " ")
        line.cursor_position = len(line.value)
        for each in (label, line):
            each.add_class("-asked")
        self._say("")
        line.focus()

    def _end_line(self) -> None:
        self._asking = None
        self.refresh_bindings()
        for each in self.query("#what, #line"):
            each.remove_class("-asked")
        self._say("")
        self._search.focus()

    def _say(self, text: str, error: bool = False) -> None:
        self._said = text
        said = self.query_one("#said", Static)
        said.set_class(error, "-error")
        said.update(Content(clean(text)))
        said.display = bool(text)


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:39] + "…"
