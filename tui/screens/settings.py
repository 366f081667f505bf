"""How a conversation is held: its system prompt, how answers are drawn, and presets of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Button, Input, Label, OptionList, Select, Static, TextArea
from textual.widgets.option_list import Option

from edger1.errors import UsageError
from edger1.messages import Sampling
from edger1.tui.clean import clean
from edger1.tui.presets import Presets
from edger1.tui.screens.confirm import ConfirmScreen
from edger1.tui.screens.over import Over
from edger1.tui.settings import SPECULATE, THINK, Settings, check
from edger1.tui.widgets.options import Options
from edger1.tui.widgets.text_box import TextBox


@dataclass(frozen=True)
class Field:
    """One number of the panel."""

    name: str
    label: str
    help: str
    whole: bool = False


DRAWING = (
    Field("temperature", "Temperature", "0 is greedy; more is more varied"),
    Field("top_p", "Top p", "the likeliest tokens that make up this share; 1 is all"),
    Field("top_k", "Top k", "so many of the likeliest tokens; 0 is all", whole=True),
    Field("min_p", "Min p", "tokens of at least this share of the likeliest; 0 is all"),
    Field("repetition_penalty", "Repetition penalty", "above 1 discourages repeats; 1 is none"),
    Field("seed", "Seed", "the same seed draws the same answer", whole=True),
    Field("max_tokens", "Max tokens", "an answer stops after so many", whole=True),
)
THINKING = (
    Field("think_budget", "Think at most", "tokens; then the answer follows", whole=True),
    Field("think_at_least", "Think at least", "tokens; until then a thought goes on", whole=True),
    Field("samples", "Samples", "so many answers, of which the majority decides", whole=True),
)
FIELDS = (*DRAWING, *THINKING)
_BY_NAME = {field.name: field for field in FIELDS}
# What is drawn with where neither the user nor the model says anything.
_PLAIN = {
    "temperature": "0", "top_p": "1", "top_k": "0", "min_p": "0", "repetition_penalty": "1", "seed": "random",
    "max_tokens": "no limit", "think_budget": "no limit", "think_at_least": "0", "samples": "1",
}  # fmt: skip
_USUAL = Settings()
SWITCH = ("off", "on")
_OF_SAMPLING = frozenset(vars(Sampling()))


def parse(field: Field, text: str) -> float | int | None:
    """Read what was typed; None for nothing: the model's choice. Raises UsageError with the reason."""
    text = text.strip().replace("_", "")
    if not text:
        return None
    value: Any
    try:
        value = int(text) if field.whole else float(text.replace(",", "."))
    except ValueError:
        value = text
    check(with_value(_USUAL, field, value))
    number: float | int = value
    return number


def with_value(settings: Settings, field: Field, value: float | int | None) -> Settings:
    """Return settings with a number in the place of a field; None is the usual one."""
    if field.name in _OF_SAMPLING:
        drawn: dict[str, Any] = {field.name: value}
        return replace(settings, sampling=replace(settings.sampling, **drawn))
    own: dict[str, Any] = {field.name: getattr(_USUAL, field.name) if value is None else value}
    return replace(settings, **own)


def value_of(settings: Settings, field: Field) -> float | int | None:
    """Return the number of a field; None where it is the usual one."""
    if field.name in _OF_SAMPLING:
        drawn: float | int | None = getattr(settings.sampling, field.name)
        return drawn
    value: float | int | None = getattr(settings, field.name)
    return None if value == getattr(_USUAL, field.name) else value


def shown(value: float | int | None) -> str:
    """Write a number as it is typed."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


class SettingsScreen(Over[Settings | None]):
    """Edits the settings of a conversation; Ctrl+S takes them, Esc leaves them as they were.

    `defaults` are the model's own, shown where nothing is typed.
    """

    BINDINGS = [  # noqa: RUF012
        Binding("escape", "dismiss", "Back"),
        Binding("ctrl+s", "take", "Take", priority=True),
        Binding("ctrl+r", "reset", "Reset", priority=True),
        Binding("ctrl+o", "presets", "Presets", priority=True),
        Binding("ctrl+n", "keep", "Save as a preset", priority=True),
    ]
    DEFAULT_CSS = """
    SettingsScreen {
        align: center middle;
        & > Vertical {
            width: 86;
            max-width: 100%;
            height: 100%;
            max-height: 26;
            padding: 0 1;
            border: round $primary;
            background: $surface;
        }
        & VerticalScroll { height: 1fr; padding: 0 1; scrollbar-size-vertical: 1; }
        & TextArea, & TextArea:focus { height: 5; border: none; padding: 0 1; background: $panel; margin-bottom: 1; }
        &.-short TextArea { height: 3; margin-bottom: 0; }
        & TextArea .text-area--cursor-line { background: transparent; }
        & .row { height: auto; }
        & .row Label { width: 20; }
        & Input, & Input:focus { border: none; height: 1; width: 14; padding: 0 1; background: $panel; }
        & Input:focus { background: $primary 30%; }
        & TextArea:focus { background: $primary 15%; }
        & Input.-wrong, & Input.-wrong:focus { background: $error 30%; }
        & .help { color: $text-muted; width: 1fr; padding: 0 0 0 2; height: 1; }
        & .help { text-overflow: ellipsis; text-wrap: nowrap; }
        & .wrong { color: $text-error; padding: 0 0 0 20; height: auto; display: none; }
        & .wrong.-shown { display: block; }
        & Select { width: 14; height: 1; }
        & .buttons { height: auto; margin-top: 1; }
        &.-short .buttons { margin-top: 0; }
        & Button { margin-right: 2; min-width: 8; }
        & #said { height: auto; max-height: 3; display: none; padding: 0 1; }
        & #said.-shown { display: block; }
        & #said.-error { color: $text-error; }
    }
    """

    def __init__(self, settings: Settings, presets: Presets, defaults: Sampling | None = None) -> None:
        super().__init__()
        self._settings, self._presets = settings, presets
        self._defaults = defaults or Sampling()
        self._refused = False
        """Whether what is said is why the settings were not taken."""

    def compose(self) -> ComposeResult:
        """The system prompt, a line a number, and what to do with them."""
        with Vertical() as box:
            box.border_title = "Settings of this conversation"
            box.border_subtitle = "^S take · ^R reset · ^O presets · ^N save as preset · Esc back"
            with VerticalScroll(can_focus=False):
                yield Label("System prompt")
                system = TextBox(placeholder="none", highlight_cursor_line=False, tab_behavior="focus")
                system.cursor_blink = False
                yield system
                for field in DRAWING:
                    yield from self._row(field)
                yield from _choice("think", "Think first", THINK, "where the model can reason or not")
                for field in THINKING:
                    yield from self._row(field)
                yield from _choice("speculate", "Drafts", SPECULATE, "guesses, verified together: the same, sooner")
                yield from _choice("context_shift", "Context shift", SWITCH, "the oldest turns go where it is full")
                with Horizontal(classes="buttons"):
                    yield Button("Take", id="take", variant="primary", compact=True)
                    yield Button("Presets", id="presets", compact=True)
                    yield Button("Save as preset", id="keep", compact=True)
                    yield Button("Reset", id="reset", compact=True)
            yield Static(id="said", markup=False)

    def _row(self, field: Field) -> ComposeResult:
        with Horizontal(classes="row"):
            yield Label(field.label)
            number = Input(placeholder=self._placeholder(field), id=field.name)
            number.cursor_blink = False
            yield number
            yield Static(field.help, classes="help")
        yield Static(id=f"wrong-{field.name}", classes="wrong", markup=False)

    def on_mount(self) -> None:
        """Show the settings as they are."""
        self._fill(self._settings)
        self.query_one("#temperature", Input).focus()
        if self._presets.problem is not None:
            self._say(self._presets.problem, error=True)

    def _placeholder(self, field: Field) -> str:
        own = getattr(self._defaults, field.name, None)
        return shown(own) if own is not None else _PLAIN[field.name]

    def _fill(self, settings: Settings) -> None:
        self.query_one(TextArea).text = clean(settings.system or "")
        for field in FIELDS:
            self.query_one(f"#{field.name}", Input).value = shown(value_of(settings, field))
        for name in ("think", "speculate"):
            self.query_one(f"#{name}", Select).value = getattr(settings, name)
        self.query_one("#context_shift", Select).value = SWITCH[settings.context_shift]

    def _read(self) -> Settings | None:
        """Return what is typed; None where something is wrong, which has the focus then."""
        system = self.query_one(TextArea).text
        chosen: dict[str, Any] = {
            name: str(self.query_one(f"#{name}", Select).value) for name in ("think", "speculate")
        }
        chosen["context_shift"] = self.query_one("#context_shift", Select).value == "on"
        settings = replace(_USUAL, system=system if system.strip() else None, **chosen)
        try:
            for field in FIELDS:
                box = self.query_one(f"#{field.name}", Input)
                settings = with_value(settings, field, parse(field, box.value))
                check(settings)
        except UsageError as error:
            box.focus()
            self._say(str(error), error=True)
            self._refused = True
            return None
        return settings

    @on(Input.Changed)
    def check(self, event: Input.Changed) -> None:
        """Say at once what is wrong with a number, below it."""
        event.stop()
        field = _BY_NAME[event.input.id or ""]
        wrong = self.query_one(f"#wrong-{field.name}", Static)
        try:
            parse(field, event.value)
            reason = ""
        except UsageError as error:
            reason = str(error)
        wrong.update(Content(clean(reason)))
        wrong.set_class(bool(reason), "-shown")
        if reason:
            # Below the field may be below the edge.
            self.call_after_refresh(wrong.scroll_visible, animate=False)
        event.input.set_class(bool(reason), "-wrong")
        if not reason and self._refused:
            self._say("")

    @on(Input.Submitted)
    def go_on(self, event: Input.Submitted) -> None:
        """Take Enter as going on to the next field."""
        event.stop()
        self.focus_next()

    @on(Button.Pressed)
    async def press(self, event: Button.Pressed) -> None:
        """Do what a button says."""
        event.stop()
        await self.run_action(event.button.id or "")

    def action_take(self) -> None:
        """Give the settings back."""
        settings = self._read()
        if settings is not None:
            self.dismiss(settings)

    def action_reset(self) -> None:
        """Leave every choice to the model."""
        self._fill(Settings())
        self._say("Everything is left to the model. Ctrl+S takes it.")

    @work(exclusive=True, group="presets")
    async def action_presets(self) -> None:
        """Choose a preset to fill the panel with, or delete one."""
        self._presets.read()
        if self._presets.problem is not None:
            self._say(self._presets.problem, error=True)
            return
        if not self._presets.names():
            self._say("There are no presets yet. Ctrl+N saves these settings as one.")
            return
        name = await self.app.push_screen_wait(PresetsScreen(self._presets))
        if name is not None:
            self._fill(self._presets.get(name))
            self._say(f"{name} is filled in. Ctrl+S takes it.")

    @work(exclusive=True, group="presets")
    async def action_keep(self) -> None:
        """Save what is typed under a name."""
        settings = self._read()
        if settings is None:
            return
        name = await self.app.push_screen_wait(NameScreen("Save these settings as"))
        if not name:
            return
        self._presets.read()
        if name in self._presets.names():
            replace = ConfirmScreen(f"There is a preset {name}. Replace it?", yes="Replace", no="Keep", careful=True)
            if not await self.app.push_screen_wait(replace):
                return
        try:
            self._presets.save(name, settings)
        except UsageError as error:
            self._say(str(error), error=True)
        else:
            self._say(f"Saved as {name}.")

    def _say(self, text: str, *, error: bool = False) -> None:
        self._refused = False
        said = self.query_one("#said", Static)
        said.update(Content(clean(text)))
        said.set_class(bool(text), "-shown")
        said.set_class(error, "-error")


def _choice(name: str, label: str, choices: tuple[str, ...], help_: str) -> ComposeResult:
    with Horizontal(classes="row"):
        yield Label(label)
        yield Select([(each, each) for each in choices], allow_blank=False, value=choices[0], compact=True, id=name)
        yield Static(help_, classes="help")


class NameScreen(Over[str | None]):
    """Asks for a name; Enter gives it, Esc does not."""

    BINDINGS = [Binding("escape", "dismiss", "Back")]  # noqa: RUF012
    DEFAULT_CSS = """
    NameScreen {
        align: center middle;
        & > Input, & > Input:focus { width: 50; max-width: 100%; border: round $primary; background: $surface; }
    }
    """

    def __init__(self, question: str, placeholder: str = "a name", *, max_length: int = 60) -> None:
        super().__init__()
        self._question, self._placeholder, self._max_length = question, placeholder, max_length

    def compose(self) -> ComposeResult:
        """One line to type in."""
        name = Input(placeholder=self._placeholder, max_length=self._max_length)
        name.cursor_blink = False
        name.border_title = self._question
        yield name

    @on(Input.Submitted)
    def take(self, event: Input.Submitted) -> None:
        """Give the name back."""
        event.stop()
        self.dismiss(event.value.strip() or None)


class PresetsScreen(Over[str | None]):
    """Lists the presets; Enter gives a name, Ctrl+D deletes one, Esc goes back."""

    BINDINGS = [  # noqa: RUF012
        Binding("escape", "dismiss", "Back"),
        Binding("ctrl+d,delete", "remove", "Delete"),
    ]
    DEFAULT_CSS = """
    PresetsScreen {
        align: center middle;
        & > Vertical {
            width: 64;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 1;
            border: round $primary;
            background: $surface;
        }
        & OptionList, & OptionList:focus { border: none; background: $surface; padding: 0; background-tint: $surface; }
        & OptionList > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList:focus > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList { height: auto; max-height: 70vh; scrollbar-size-vertical: 1; }
    }
    """

    def __init__(self, presets: Presets) -> None:
        super().__init__()
        self._presets = presets

    def compose(self) -> ComposeResult:
        """A name and what it sets in each line."""
        with Vertical() as box:
            box.border_title = "Presets"
            box.border_subtitle = "Enter fills in · ^D deletes · Esc back"
            yield Options(*self._options(), markup=False)
            yield Static(id="said", markup=False)

    def _options(self) -> list[Option]:
        return [
            Option(
                Content.assemble((clean(name), "bold"), "  ", (in_words(self._presets.get(name)), "$foreground 70%"))
            )
            for name in self._presets.names()
        ]

    @on(OptionList.OptionSelected)
    def take(self, event: OptionList.OptionSelected) -> None:
        """Give the name on which Enter was pressed."""
        event.stop()
        self.dismiss(self._presets.names()[event.option_index])

    @work(exclusive=True)
    async def action_remove(self) -> None:
        """Delete the preset under the cursor."""
        at = self.query_one(OptionList).highlighted
        if at is None:
            return
        name = self._presets.names()[at]
        if not await self.app.push_screen_wait(
            ConfirmScreen(f"Delete the preset {name}?", yes="Delete", no="Keep", careful=True)
        ):
            return
        try:
            self._presets.delete(name)
        except (KeyError, UsageError) as error:
            self.query_one("#said", Static).update(Content(clean(str(error))))
            return
        if not self._presets.names():
            self.dismiss(None)
            return
        self.query_one(OptionList).set_options(self._options())


def in_words(settings: Settings) -> str:
    """Return what settings set, in one line."""
    words = []
    for field in FIELDS:
        value = value_of(settings, field)
        if value is not None:
            words.append(f"{field.label.lower()} {shown(value)}")
    if settings.think != "auto":
        words.append(f"think {settings.think}")
    if settings.speculate != "off":
        words.append(f"drafts {settings.speculate}")
    if settings.context_shift:
        words.append("context shift")
    if settings.system:
        words.append(f"system {' '.join(clean(settings.system).split())!r:.40}")
    return ", ".join(words) or "nothing"
