"""What one sees who has no model yet: a few that suit this machine, and the ways without a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from edger1.errors import EdgeR1Error
from edger1.tui import model_words
from edger1.tui.catalogue import Advice, Catalogue, Chosen, Entry
from edger1.tui.clean import clean
from edger1.tui.fetches import Fetch, Fetches
from edger1.tui.figures import memory
from edger1.tui.screens.models import ModelsScreen
from edger1.tui.screens.over import Over
from edger1.tui.screens.settings import NameScreen
from edger1.tui.widgets.options import Options
from edger1.units import format_bytes

ALL, FOLDER = "all-models", "a-folder"
WITHOUT_NETWORK = (
    "Without a network: take a model that is on this machine, give a folder with one, or run `edger1 pull NAME` later."
)


class FirstRunScreen(Over[Chosen | None]):
    """Recommends models by the machine's memory and fetches the chosen one; None where the user goes on without.

    `memory_bytes` is what the machine has, `ceiling_bytes` what a model may take of it. `fetches` outlive the screen;
    where none are given, those begun here end with it.
    """

    BINDINGS = [  # noqa: RUF012
        Binding("escape", "dismiss", "Back"),
        Binding("ctrl+x", "stop_fetch", "Stop a fetch"),
    ]
    DEFAULT_CSS = """
    FirstRunScreen {
        align: center middle;
        & > Vertical {
            width: 84;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 1 2;
            border: round $primary;
            background: $surface;
        }
        &.-short > Vertical { padding: 0 1; height: 100%; }
        & #machine { height: auto; margin-bottom: 1; }
        &.-short #machine { margin-bottom: 0; }
        & OptionList, & OptionList:focus { border: none; background: $surface; padding: 0; background-tint: $surface; }
        & OptionList > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList:focus > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList { height: auto; max-height: 55vh; scrollbar-size-vertical: 1; }
        &.-short OptionList { height: 1fr; max-height: 100%; }
        & #said, & #progress { height: auto; max-height: 7; margin-top: 1; display: none; }
        &.-short #said, &.-short #progress { margin-top: 0; }
        & #said.-shown, & #progress.-shown { display: block; }
        & #said.-error { color: $text-error; }
        & #progress { color: $text-primary; }
    }
    """

    def __init__(
        self,
        catalogue: Catalogue,
        memory_bytes: int,
        *,
        ceiling_bytes: int | None = None,
        fetches: Fetches | None = None,
    ) -> None:
        super().__init__()
        self._catalogue = catalogue
        self._memory_bytes, self._ceiling_bytes = memory_bytes, ceiling_bytes
        self._fetches = fetches or Fetches(catalogue)
        self._own_fetches = fetches is None
        self._advice: dict[str, Advice] = {}
        self._here: dict[str, Entry] = {}
        self._wanted: str | None = None
        self._deaf: Callable[[], None] = lambda: None

    def compose(self) -> ComposeResult:
        """The machine, the models, and what is going on."""
        share = f", of which a model may take {memory(self._ceiling_bytes)}" if self._ceiling_bytes else ""
        with Vertical() as box:
            box.border_title = "Choose a model to begin with"
            box.border_subtitle = "Enter takes it · ^X stops a fetch · Esc back"
            machine = f"This machine has {memory(self._memory_bytes)} of memory{share}."
            yield Static(f"{machine} Times are for 100 Mbit/s.", id="machine", markup=False)
            yield Options(markup=False)
            yield Static(id="said", markup=False)
            yield Static(id="progress", markup=False)

    def on_mount(self) -> None:
        """Begin to look for what suits."""
        self._deaf = self._fetches.listen(self._on_fetch)
        self.query_one(OptionList).focus()
        self.load()

    async def on_unmount(self) -> None:
        """Leave the fetches to whoever owns them."""
        self._deaf()
        if self._own_fetches:
            await self._fetches.close()

    @work(exclusive=True, group="load")
    async def load(self) -> None:
        """Ask for recommendations and for what is here."""
        try:
            self._advice = {each.name: each for each in await self._catalogue.recommended()}
            found = await self._catalogue.entries()
        except EdgeR1Error as error:
            found = []
            self._say(str(error), error=True)
        here = [entry for entry in found if entry.installed and not entry.problem and entry.fit != "too big"]
        self._here = {entry.name: entry for entry in here}
        options = [Option(_advised(each, first=at == 0), id=each.name) for at, each in enumerate(self._advice.values())]
        options += [Option(_present(entry), id=entry.name) for entry in here if entry.name not in self._advice]
        options.append(Option(_other("All models", "search, sizes, licences, what fits"), id=ALL))
        options.append(Option(_other("A folder", "with a model that is on this machine"), id=FOLDER))
        self.query_one(OptionList).set_options(options)
        self.query_one(OptionList).highlighted = 0

    @on(OptionList.OptionSelected)
    def take(self, event: OptionList.OptionSelected) -> None:
        """Start with what Enter was pressed on, fetching it first where it is not here."""
        event.stop()
        name = event.option.id or ""
        if name == ALL:
            self._choose_from_all()
        elif name == FOLDER:
            self._ask_for_folder()
        elif (folder := self._folder(name)) is not None:
            self.dismiss(Chosen(name, folder))
        else:
            self._wanted = name
            self._say("")
            self._fetches.add(name)

    def _folder(self, name: str) -> Path | None:
        known = self._here.get(name) or self._advice.get(name)
        return known.folder if known is not None else None

    @work(exclusive=True, group="decide")
    async def _choose_from_all(self) -> None:
        chosen = await self.app.push_screen_wait(ModelsScreen(self._catalogue, self._fetches))
        if chosen is not None:
            self.dismiss(chosen)

    @work(exclusive=True, group="decide")
    async def _ask_for_folder(self) -> None:
        text = await self.app.push_screen_wait(NameScreen("The folder of a model", "a path", max_length=0))
        if not text:
            return
        try:
            self.dismiss(await self._catalogue.find(text))
        except EdgeR1Error as error:
            self._say(str(error), error=True)

    def action_stop_fetch(self) -> None:
        """Stop the fetch that is under way."""
        open_ = self._fetches.open
        if open_:
            self._fetches.stop(open_[0].name)

    def _on_fetch(self, fetch: Fetch) -> None:
        if not self.whole:
            return
        progress = self.query_one("#progress", Static)
        waiting = [each.name for each in self._fetches.open if each.status == "waiting"]
        running = next((each for each in self._fetches.open if each.status != "waiting"), None)
        progress.set_class(running is not None, "-shown")
        if running is not None:
            progress.update(Content.assemble(_bar(running, self.size.width), model_words.progress(running, waiting)))
        if fetch.status == "done" and fetch.name == self._wanted and fetch.folder is not None and self.is_current:
            self.dismiss(Chosen(fetch.name, fetch.folder))
        elif fetch.status == "failed":
            self._say(f"{fetch.message}\n{WITHOUT_NETWORK}", error=True)
        elif fetch.status == "stopped":
            self._say(f"{fetch.name} is stopped. What came is kept; taking it again goes on from there.")

    def _say(self, text: str, *, error: bool = False) -> None:
        said = self.query_one("#said", Static)
        said.update(Content(clean(text)))
        said.set_class(bool(text), "-shown")
        said.set_class(error, "-error")


def _advised(advice: Advice, *, first: bool) -> Content:
    facts = [format_bytes(advice.size_bytes)] if advice.size_bytes else []
    if advice.folder is not None:
        facts.append("here already")
    elif advice.download_s is not None:
        facts.append(f"about {_roughly(advice.download_s)}")
    name = Content.assemble((model_words.line(advice.name), "bold $text-primary" if first else "bold"))
    if first:
        name = Content.assemble(name, ("  recommended", "$text-success"))
    said = Content.assemble(("  " + model_words.line(advice.why), "$foreground 70%"))
    return Content.assemble(name, "  ", (" · ".join(facts), "$foreground 70%"), "\n", said)


def _present(entry: Entry) -> Content:
    size = f"{format_bytes(entry.size_bytes)} · " if entry.size_bytes else ""
    facts = f"  {size}here already, no network needed"
    about = "  " + model_words.line(entry.title)
    return Content.assemble(
        (model_words.line(entry.name), "bold"), (facts, "$foreground 70%"), "\n", (about, "$foreground 70%")
    )


def _other(name: str, about: str) -> Content:
    return Content.assemble((name, "bold"), (f"  {about}", "$foreground 70%"))


def _roughly(seconds: float) -> str:
    """A length of time to choose by: 45 s, 6 min, 2.5 h."""
    if seconds < 60:
        return f"{max(5, round(seconds / 5) * 5)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _bar(fetch: Fetch, width: int) -> Content:
    """A bar on a line of its own; nothing where it is not known how much there is to do."""
    if fetch.step is None or not fetch.step.total:
        return Content("")
    wide = max(10, min(60, width - 8))
    full = round(wide * min(1.0, fetch.step.done / fetch.step.total))
    return Content.assemble(("━" * full, "$primary"), ("━" * (wide - full), "$secondary 30%"), "\n")
