"""`@`: find a file or directory to attach."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from textual import events
from textual.widgets import OptionList

from edger1.tui import attaching
from edger1.tui.attaching import AttachError
from edger1.tui.chips import amount
from edger1.tui.clean import clean
from edger1.tui.fuzzy import rank
from edger1.tui.mentions import Mention, mention_at
from edger1.tui.walking import walk
from edger1.tui.widgets.completion import marked
from edger1.tui.widgets.popup import ROWS_MAX, Popup
from edger1.tui.widgets.prompt import Prompt
from edger1.units import format_bytes

ENTRIES_MAX = 20_000
WALK_S = 3.0
"""How much of a huge tree is listed: this many entries and seconds; the rest is reached by typing its path."""
FRESH_S = 5.0
_BATCH_S = 0.15
_REST_S = 0.1
"""How long a choice rests before its file is read to count it."""


class FilePicker(Popup):
    """Lists what lies below the working directory, or in the directory whose path is typed (`/`, `~`, `./`, `../`)."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(prompt)
        self._mention: Mention | None = None
        self._left: tuple[int, int] | None = None
        self._names: list[str] = []
        self._more = False
        self._walked_at: float | None = None
        self._stop: threading.Event | None = None
        self._listed: tuple[str, list[str]] | None = None
        self._reading: str | None = None

    # What is shown

    def follow(self) -> None:
        """Show what fits the mention that the cursor stands in."""
        row, column = self.prompt.cursor_location
        found = mention_at(self.prompt.document[row][:column]) if self.prompt.selection.is_empty else None
        if found is None:
            self._left = None
        if found is None or (row, found.begin) == self._left or self.prompt.document[0].startswith("/"):
            self.hide()
            return
        if self._mention is None:
            # Once for a mention: walking takes its turns from the keys.
            self._walk_soon()
        self._mention = found
        self._refresh()

    def _refresh(self) -> None:
        """Rank what there is for what is typed."""
        if self._mention is None:
            return
        query = self._mention.query
        folder, last = _typed(query)
        if folder is None:
            names = self._names
            more = f" (the first {ENTRIES_MAX:,}; type a path for others)" if self._more else ""
            title, prefix = f"Files{more}", ""
        else:
            names = self._list(folder)
            last, title, prefix = last, clean(folder) or ".", folder
        shown = [names[index] for index in rank(last, names, ROWS_MAX)]
        if shown:
            self.show([(marked(name, last), prefix + name) for name in shown], title, "⏎ attach · esc leave")
        elif self._busy:
            self.say("Looking", title)
        else:
            self.hide()

    @property
    def _busy(self) -> bool:
        return self._stop is not None or self._reading is not None

    def hide(self) -> None:
        """Show nothing and stop looking."""
        super().hide()
        self._mention = None
        self.workers.cancel_group(self, "measure")

    # What there is

    def _walk_soon(self) -> None:
        fresh = self._walked_at is not None and time.monotonic() - self._walked_at < FRESH_S
        if self._stop is None and not fresh:
            self._stop = threading.Event()
            self.run_worker(self._walk(self._stop), group="walk", exit_on_error=False)

    async def _walk(self, stop: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        first = not self._names

        def found(names: list[str]) -> None:
            if first and not stop.is_set():
                self._names = names
                self._refresh()

        try:
            names, more = await asyncio.to_thread(
                _collect, self.prompt.root, stop, lambda names: loop.call_soon_threadsafe(found, names)
            )
        finally:
            stop.set()
            self._stop = None
        self._walked_at = time.monotonic()
        if names != self._names or more != self._more or not names:
            self._names, self._more = names, more
            self._refresh()

    def _list(self, folder: str) -> list[str]:
        """Return the names in a directory, as far as it has been read."""
        if self._listed is not None and self._listed[0] == folder:
            return self._listed[1]
        self._listed, self._reading = (folder, []), folder
        self.run_worker(self._read_folder(folder), group="list", exclusive=True, exit_on_error=False)
        return []

    async def _read_folder(self, folder: str) -> None:
        names = await asyncio.to_thread(_folder_names, self._path(folder or "."))
        if self._reading == folder:
            self._listed, self._reading = (folder, names), None
            self._refresh()

    def _path(self, name: str) -> Path:
        return self.prompt.root / os.path.expanduser(name)  # noqa: PTH111  # an unknown ~user stays as it is

    # Taking

    def take_key(self, event: events.Key) -> bool:
        """A space behind a file's whole name takes it too; Tab goes into a directory whose path is being typed."""
        query = self._mention.query if self._mention is not None else ""
        if event.key == "space" and query in self.values and not query.endswith("/"):
            self.highlighted = self.values.index(query)
            self.take("space")
            return True
        if event.key == "tab" and self.values and _typed(query)[0] is not None and self.chosen.endswith("/"):
            self._go_into(self.chosen)
            return True
        return super().take_key(event)

    def _go_into(self, folder: str) -> None:
        if self._mention is None:
            return
        row, column = self.prompt.cursor_location
        quote = '"' if any(each.isspace() or each in '"\\' for each in folder) else ""
        self.prompt.replace(
            f"@{quote}{folder}", (row, self._mention.begin), (row, column), maintain_selection_offset=False
        )

    def take(self, key: str) -> None:
        """Attach what is chosen."""
        name, found = self.chosen, self._mention
        self.hide()
        if found is not None:
            self.prompt.attach(self._path(name), found.begin)

    def leave(self) -> None:
        """Stay away from this mention."""
        if self._mention is not None:
            self._left = (self.prompt.cursor_location[0], self._mention.begin)
        self.hide()

    # What the choice would cost

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Measure what is chosen, once the choice rests."""
        event.stop()
        if self.is_open and self.chosen is not None:
            self.run_worker(self._measure(self.chosen), group="measure", exclusive=True, exit_on_error=False)

    async def _measure(self, name: str) -> None:
        await asyncio.sleep(_REST_S)
        path = self._path(name)
        try:
            size = await asyncio.to_thread(attaching.measure, path)
            said = format_bytes(size.size_bytes)
            if size.more or (size.files == 1 and size.size_bytes > attaching.FILE_BYTES):
                self._tell(name, f"{said}{' and more' if size.more else ''}: too large to attach whole")
                return
            many = f"{size.files} files, " if name.endswith("/") else ""
            tokens, counted = (size.size_bytes + 3) // 4, False
            self._tell(name, f"{many}{said}, {amount(tokens, counted)} tokens")
            if not many:
                text = (await asyncio.to_thread(attaching.read, path, root=self.prompt.root)).attachments[0].text
                exact = await self.prompt.count(text) if self.prompt.count is not None else None
                tokens, counted = (attaching.estimate_tokens(text), False) if exact is None else (exact, True)
            self._tell(name, f"{many}{said}, {amount(tokens, counted)} tokens{self._in_all(tokens, counted)}")
        except AttachError as error:
            self._tell(name, clean(str(error)))

    def _in_all(self, tokens: int, counted: bool) -> str:
        others = [chip.tokens for chip in self.prompt.chips]
        every = amount(tokens + sum(count for count, _ in others), counted and all(exact for _, exact in others))
        if self.prompt.context:
            return f"; with it {every} of {self.prompt.context:,}"
        return f"; with it {every}" if others else ""

    def _tell(self, name: str, words: str) -> None:
        if self.is_open and self.chosen == name:
            self.foot(words)


def _typed(query: str) -> tuple[str | None, str]:
    """Return the directory whose path is typed and the rest, or None and all where any file below is meant."""
    if query == "~":
        return "~/", ""
    if query.startswith(("/", "~/", "./", "../")) or (query.startswith("~") and "/" in query):
        folder, slash, last = query.rpartition("/")
        return folder + slash, last
    if query.startswith("."):
        return "", query
    return None, query


def _folder_names(folder: Path) -> list[str]:
    """Return what is in a directory, ordinary names first, directories with a slash; nothing where it is unreadable."""
    names: list[str] = []
    try:
        with os.scandir(folder) as listing:
            for entry in listing:
                if len(names) == ENTRIES_MAX:
                    break
                try:
                    names.append(entry.name + "/" * entry.is_dir())
                except OSError:
                    continue
    except (OSError, ValueError):
        return []
    return sorted(names, key=lambda name: (name.startswith("."), name.lower()))


def _collect(root: Path, stop: threading.Event, tell: Callable[[list[str]], object]) -> tuple[list[str], bool]:
    """Return what lies below a directory, and whether there is more; `tell` gets what there is at times."""
    names: list[str] = []
    began = told = time.monotonic()
    for found in walk(root, entries_max=ENTRIES_MAX, seconds_max=WALK_S, stop=stop.is_set):
        names.append(found.name + "/" * found.is_directory)
        if time.monotonic() - told > _BATCH_S:
            told = time.monotonic()
            tell(list(names))
    return names, len(names) >= ENTRIES_MAX or time.monotonic() - began > WALK_S
