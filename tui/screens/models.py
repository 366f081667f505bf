"""The models: those here and those to be fetched, searched, chosen, fetched and deleted."""

from __future__ import annotations

from collections.abc import Callable

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.fuzzy import FuzzySearch
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from edger1.errors import EdgeR1Error
from edger1.tui import model_words
from edger1.tui.catalogue import Catalogue, Chosen, Entry
from edger1.tui.clean import clean
from edger1.tui.fetches import Fetch, Fetches
from edger1.tui.screens.adapters import AdaptersScreen
from edger1.tui.screens.confirm import ConfirmScreen
from edger1.tui.screens.over import Over
from edger1.tui.widgets.options import Options
from edger1.units import format_bytes

LOOKING = "Looking for models"
HERE, ELSEWHERE = "On this machine", "To be fetched"


class ModelsScreen(Over[Chosen | None]):
    """Lists the models and gives the chosen one, with its adapter; None where the user goes back.

    `fetches` outlive the screen; where none are given, those begun here end with it. `current` is the model in use.
    """

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (100, "-wide")]  # noqa: RUF012
    BINDINGS = [  # noqa: RUF012
        Binding("escape", "back", "Back", priority=True),
        Binding("enter", "take", "Choose or fetch", priority=True),
        Binding("ctrl+x", "stop_fetch", "Stop a fetch", priority=True),
        Binding("ctrl+d", "remove", "Delete", priority=True),
        Binding("up", "move('cursor_up')", show=False, priority=True),
        Binding("down", "move('cursor_down')", show=False, priority=True),
        Binding("pageup", "move('page_up')", show=False, priority=True),
        Binding("pagedown", "move('page_down')", show=False, priority=True),
    ]
    DEFAULT_CSS = """
    ModelsScreen {
        align: center middle;
        & > Vertical {
            width: 100%;
            max-width: 124;
            height: 100%;
            max-height: 44;
            padding: 0 1;
            border: round $primary;
            background: $surface;
        }
        & Input, & Input:focus { border: none; height: 1; padding: 0 1; background: $panel; margin-bottom: 1; }
        &.-short Input { margin-bottom: 0; }
        & OptionList { height: 1fr; width: 1fr; border: none; background: $surface; padding: 0; }
        & OptionList > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList:focus > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList { scrollbar-size-vertical: 1; }
        & #details { display: none; width: 46; padding: 0 0 0 2; margin-left: 1; border-left: solid $secondary 40%; }
        & #why { height: auto; max-height: 2; color: $text-muted; padding: 0 1; }
        & #said, & #progress { height: auto; max-height: 3; padding: 0 1; display: none; }
        & #progress { max-height: 2; color: $text-primary; }
        & #said.-shown, & #progress.-shown { display: block; }
        & #said.-error { color: $text-error; }
        &.-wide #details { display: block; }
        &.-wide #why { display: none; }
    }
    """

    def __init__(self, catalogue: Catalogue, fetches: Fetches | None = None, *, current: str | None = None) -> None:
        super().__init__()
        self._catalogue = catalogue
        self._fetches = fetches or Fetches(catalogue)
        self._own_fetches = fetches is None
        self._current = current
        self._entries: dict[str, Entry] = {}
        self._matches: dict[str, Content] = {}
        self._listed: list[str] = []
        self._said = ""
        self._deaf: Callable[[], None] = lambda: None

    def compose(self) -> ComposeResult:
        """The search above, the list, what is known of the one under the cursor, and what is going on."""
        with Vertical() as box:
            box.border_title = "Models"
            box.border_subtitle = "Enter choose or fetch · ^X stop · ^D delete · Esc back"
            search = Input(placeholder="Search models")
            search.cursor_blink = False
            yield search
            with Horizontal():
                models = Options(markup=False)
                # Typing goes on while the list moves.
                models.can_focus = False
                yield models
                with VerticalScroll(id="details", can_focus=False):
                    yield Static(markup=False)
            yield Static(id="why", markup=False)
            yield Static(id="said", markup=False)
            yield Static(id="progress", markup=False)

    def on_mount(self) -> None:
        """Begin to look for models."""
        self._deaf = self._fetches.listen(self._on_fetch)
        self.query_one(Input).focus()
        self._say(LOOKING)
        self.load()

    async def on_unmount(self) -> None:
        """Leave the fetches to whoever owns them."""
        self._deaf()
        if self._own_fetches:
            await self._fetches.close()

    @work(exclusive=True, group="load")
    async def load(self) -> None:
        """Ask for the models and list them; the cursor stays on the model it is on."""
        try:
            found = await self._catalogue.entries()
        except EdgeR1Error as error:
            self._say(str(error), error=True)
            return
        self._entries = {entry.name: entry for entry in found}
        if self._said == LOOKING:
            self._say("")
        self._list()
        self._tell_progress()

    # The list

    @on(Input.Changed)
    def search(self, event: Input.Changed) -> None:
        """List what matches."""
        event.stop()
        self._list()

    def on_resize(self, event: events.Resize) -> None:
        """Lay the rows out anew."""
        self.call_after_refresh(self._list)

    @property
    def _models(self) -> OptionList:
        return self.query_one(OptionList)

    @property
    def _under_cursor(self) -> Entry | None:
        option = self._models.highlighted_option
        return self._entries.get(option.id) if option is not None and option.id is not None else None

    def _list(self) -> None:
        before, query = self._under_cursor, self.query_one(Input).value.strip()
        chosen = self._matching(query)
        options: list[Option] = []
        for title, here in ((HERE, True), (ELSEWHERE, False)):
            entries = [entry for entry in chosen if entry.installed is here]
            if entries:
                options.append(Option(Content.assemble((title, "bold $foreground 70%")), disabled=True))
                options += [Option(self._row(entry), id=entry.name) for entry in entries]
        self._listed = [option.id for option in options if option.id is not None]
        self._models.set_options(options)
        if not self._listed:
            nothing = f"No model matches {query!r}." if query and self._entries else ""
            self.query_one("#why", Static).update(Content(clean(nothing)))
            self.query_one("#details Static", Static).update(Content(clean(nothing)))
            return
        wanted = before.name if before is not None and not query else None
        wanted = wanted or (self._current if not query else None)
        name = wanted if wanted in self._listed else self._listed[0]
        self._models.highlighted = self._models.get_option_index(name)

    def _matching(self, query: str) -> list[Entry]:
        """Return the models that match, the best first; all in their order where nothing is asked for."""
        self._matches = {}
        if not query:
            return list(self._entries.values())
        fuzzy, ranked = FuzzySearch(), []
        for entry in self._entries.values():
            by_name, at = fuzzy.match(query, entry.name)
            by_title, _ = fuzzy.match(query, model_words.line(entry.title))
            if by_name:
                name = Content(entry.name)
                for i in at:
                    name = name.stylize("underline", i, i + 1)
                self._matches[entry.name] = name
            if by_name or by_title:
                ranked.append((max(2 * by_name, by_title), entry))
        return [entry for _, entry in sorted(ranked, key=lambda each: -each[0])]

    def _row(self, entry: Entry) -> Content:
        width = self._models.scrollable_content_region.width or self.size.width - 8
        return model_words.row(
            entry,
            width - 2,
            self._fetches.of(entry.name),
            current=entry.name == self._current,
            name=self._matches.get(entry.name),
        )

    @on(OptionList.OptionHighlighted)
    def show(self, event: OptionList.OptionHighlighted) -> None:
        """Show what is known of the model under the cursor."""
        event.stop()
        entry = self._under_cursor
        if entry is not None:
            self.query_one("#why", Static).update(model_words.fit(entry))
            self.query_one("#details Static", Static).update(model_words.details(entry))

    def action_move(self, how: str) -> None:
        """Move the cursor of the list."""
        getattr(self._models, f"action_{how}")()

    # What the user decides

    @on(OptionList.OptionSelected)
    def click(self, event: OptionList.OptionSelected) -> None:
        """Take the model that was clicked."""
        event.stop()
        self.action_take()

    def action_back(self) -> None:
        """Leave, or clear the search first."""
        search = self.query_one(Input)
        if search.value:
            search.value = ""
        else:
            self.dismiss(None)

    def action_take(self) -> None:
        """Choose the model under the cursor, or fetch it."""
        entry = self._under_cursor
        if entry is None:
            return
        if entry.problem:
            self._say(f"{entry.name} cannot be used: {entry.problem}", error=True)
        elif entry.installed:
            self._choose(entry)
        elif (fetch := self._fetches.of(entry.name)) is not None and fetch.open:
            self._say(f"{entry.name} is being fetched already. Ctrl+X stops it.")
        else:
            self._offer(entry)

    @work(exclusive=True, group="decide")
    async def _choose(self, entry: Entry) -> None:
        assert entry.folder is not None
        if entry.fit == "too big":
            question = f"{entry.name} is too big. {entry.why}\n\nTry to load it all the same?"
            if not await self.app.push_screen_wait(ConfirmScreen(question, yes="Try", no="Back", careful=True)):
                return
        try:
            adapters = await self._catalogue.adapters(entry.folder)
        except EdgeR1Error as error:
            self._say(str(error), error=True)
            return
        adapter = None
        if adapters:
            choice = await self.app.push_screen_wait(AdaptersScreen(entry.name, adapters))
            if choice is None:
                return
            adapter = choice.folder
        self.dismiss(Chosen(entry.name, entry.folder, adapter))

    @work(exclusive=True, group="decide")
    async def _offer(self, entry: Entry) -> None:
        if await self.app.push_screen_wait(ConfirmScreen(offer(entry), yes="Fetch", no="Back")):
            self._fetches.add(entry.name)

    def action_stop_fetch(self) -> None:
        """Stop the fetch of the model under the cursor, else the one that is under way."""
        entry, open_ = self._under_cursor, [fetch.name for fetch in self._fetches.open]
        name = entry.name if entry is not None and entry.name in open_ else next(iter(open_), None)
        if name is None or not self._fetches.stop(name):
            self._say("Nothing is being fetched.")

    @work(exclusive=True, group="decide")
    async def action_remove(self) -> None:
        """Delete the model under the cursor, or what an unfinished fetch of it left."""
        entry = self._under_cursor
        if entry is None:
            return
        if not entry.installed and not entry.begun_bytes:
            self._say(f"{entry.name} is not on this machine.")
        elif entry.own:
            self._say(f"{entry.name} is a part of EdgeR1 and goes with it.")
        elif entry.name == self._current:
            self._say(f"{entry.name} is in use. Choose another model first.")
        elif any(fetch.name == entry.name for fetch in self._fetches.open):
            self._say(f"{entry.name} is being fetched. Ctrl+X stops that.")
        else:
            frees = format_bytes((entry.size_bytes if entry.installed else entry.begun_bytes) or 0)
            what = f"Delete {entry.name}? That frees {frees}, and it must be fetched again to be used."
            if entry.linked:
                what = f"Take {entry.name} off the list? Its folder stays where it is."
            elif not entry.installed:
                what = f"Delete what was fetched of {entry.name}? That frees {frees}."
            if await self.app.push_screen_wait(ConfirmScreen(what, yes="Delete", no="Keep", careful=True)):
                await self._remove(entry)

    async def _remove(self, entry: Entry) -> None:
        try:
            freed = await self._catalogue.remove(entry.name)
        except (EdgeR1Error, OSError) as error:
            self._say(f"{entry.name} could not be deleted: {error}", error=True)
            return
        await self.load().wait()
        self._say(
            f"{entry.name} is deleted, {format_bytes(freed)} freed." if freed else f"{entry.name} is off the list."
        )

    # What is going on

    def _on_fetch(self, fetch: Fetch) -> None:
        if not self.whole:
            return
        entry = self._entries.get(fetch.name)
        if entry is not None and fetch.name in self._listed:
            self._models.replace_option_prompt(fetch.name, self._row(entry))
        if fetch.status == "failed":
            self._say(fetch.message, error=True)
        elif fetch.status == "done":
            self._say(f"{fetch.name} is here. Enter chooses it.")
        elif fetch.status == "stopped":
            self._say(f"{fetch.name} is stopped. What came is kept; fetching it again goes on from there.")
        self._tell_progress()
        if not fetch.open:
            self.load()

    def _tell_progress(self) -> None:
        open_ = self._fetches.open
        running = next((fetch for fetch in open_ if fetch.status != "waiting"), None)
        waiting = [fetch.name for fetch in open_ if fetch.status == "waiting"]
        progress = self.query_one("#progress", Static)
        progress.set_class(running is not None, "-shown")
        if running is not None:
            progress.update(Content(model_words.progress(running, waiting)))

    def _say(self, text: str, *, error: bool = False) -> None:
        self._said = text
        said = self.query_one("#said", Static)
        said.update(Content(clean(text)))
        said.set_class(bool(text), "-shown")
        said.set_class(error, "-error")


def offer(entry: Entry) -> str:
    """The question whether to fetch a model, with what there is to know before."""
    left = (entry.size_bytes or 0) - entry.begun_bytes
    size = format_bytes(entry.size_bytes) if entry.size_bytes else "a size that is not known yet"
    lines = [f"Fetch {model_words.line(entry.name)}: {size}?"]
    if entry.begun_bytes and left > 0:
        lines.append(f"{format_bytes(entry.begun_bytes)} are here already; it goes on from there.")
    if entry.licence:
        lines.append(f"Licence: {model_words.line(entry.licence)}.")
    if entry.fit == "too big":
        lines.append(f"It is too big for this machine. {model_words.line(entry.why)}")
    elif entry.fit != "unknown":
        lines.append(f"It {entry.fit}. {model_words.line(entry.why)}")
    return "\n".join(lines)
