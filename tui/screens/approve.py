"""Asks whether a tool may run, and shows exactly what would."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.timer import Timer
from textual.widgets import Button, Static

from edger1.tui.clean import clean
from edger1.tui.screens.over import Over
from edger1.tui.widgets.arguments import argument_lines, reveal
from edger1.tui.widgets.paged import Paged

Answer = Literal["once", "conversation", "always", "no"]
QUIET_S = 0.3
"""No key and no click counts before nobody has pressed a key for this long: who is typing has not read the question."""
CHOICES: tuple[tuple[Answer, str], ...] = (
    ("no", "No"),
    ("once", "Once"),
    ("conversation", "This conversation"),
    ("always", "Always"),
)


class Called(Protocol):
    """What the screen needs of a call."""

    @property
    def arguments(self) -> dict[str, Any]:
        """What the tool is given."""


class Described(Protocol):
    """What the screen needs of a tool, see `edger1.tools.Tool`."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def description(self) -> str:
        """What it says of itself."""

    @property
    def origin(self) -> str:
        """Whose it is."""

    @property
    def runs(self) -> str:
        """The program, address or file behind it."""


class ApproveScreen(Over[Answer]):
    """A question with a safe default: the focus is on No, Esc means No, and no letter approves anything."""

    AUTO_FOCUS = ""
    BINDINGS = [  # noqa: RUF012
        Binding("escape", "refuse", "No"),
        Binding("left", "move(-1)", "Left", show=False),
        Binding("right", "move(1)", "Right", show=False),
        Binding("up", "scroll(-1)", "Up", show=False),
        Binding("down", "scroll(1)", "Down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
    ]
    DEFAULT_CSS = """
    ApproveScreen {
        align: center middle;
        & > Vertical {
            width: 84;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 1;
            border: round $warning;
            background: $surface;
        }
        & .head { height: auto; max-height: 3; }
        &.-short .head { max-height: 2; }
        & VerticalScroll { height: auto; margin: 1 0; scrollbar-size-vertical: 1; }
        &.-short VerticalScroll { margin: 0; }
        & .about { color: $text-muted; margin-top: 1; }
        &.-short .about { margin: 0; }
        & Horizontal { height: 1; }
        & Button.-style-default { min-width: 6; margin-right: 2; background: $panel; text-style: none; }
        & Button.-style-default:focus { background: $primary; color: $background; text-style: bold underline; }
        & .hint { color: $text-muted; height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    }
    """

    def __init__(self, call: Called, tool: Described, *, changed: bool = False, quiet_s: float = QUIET_S) -> None:
        """`changed`: the tool was allowed always, and has changed since."""
        super().__init__()
        self._call = call
        self._tool = tool
        self._changed = changed
        self._quiet_s = quiet_s
        self._listens = False
        self._quiet: Timer | None = None

    def compose(self) -> ComposeResult:
        """What is asked, what would run, the answers."""
        tool = self._tool
        with Vertical() as box:
            box.border_title = "May this tool run?"
            head = [Content.assemble(reveal(tool.name).stylize("bold $text-primary"), " · ", reveal(tool.origin))]
            if self._changed:
                head.append(Content("It has changed since you always allowed it.").stylize("$warning bold"))
            yield Static(Content("\n").join(head), markup=False, classes="head")
            # The arguments first: they are what runs, and a long description must not push them out of sight.
            with VerticalScroll():
                yield Paged(argument_lines(self._call.arguments), "given", page=1_000)
                about = []
                if tool.runs and tool.runs not in tool.origin:
                    about.append(Content.assemble("By: ", reveal(tool.runs)))
                if says := " ".join(clean(tool.description).split()):
                    about.append(Content(f"It says of itself: {says}"))
                if about:
                    yield Static(Content("\n").join(about), markup=False, classes="about")
            with Horizontal():
                for answer, label in CHOICES:
                    yield Button(label, id=answer, compact=True, disabled=True)
            yield Static("←→ choose · Enter answers · ↑↓ scroll · Esc: no", markup=False, classes="hint")

    def on_mount(self) -> None:
        """Wait until nobody types."""
        self._quiet = self.set_timer(self._quiet_s, self._listen)

    def on_resize(self) -> None:
        """Leave room for the answers. In cells, because a share of the screen is not counted into the box's height."""
        self.query_one(VerticalScroll).styles.max_height = max(3, self.size.height // 2)

    def on_key(self, event: events.Key) -> None:
        """Begin the wait again for a key that was meant for something else."""
        if not self._listens and self._quiet is not None:
            event.stop()
            self._quiet.stop()
            self._quiet = self.set_timer(self._quiet_s, self._listen)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """No key does anything before the screen listens."""
        return self._listens and super().check_action(action, parameters)

    def _listen(self) -> None:
        self._listens = True
        for button in self.query(Button):
            button.disabled = False
        self.query_one("#no", Button).focus()

    @on(Button.Pressed)
    def take(self, event: Button.Pressed) -> None:
        """Answer."""
        if self._listens:
            self.dismiss(next(answer for answer, _ in CHOICES if answer == event.button.id))

    def action_refuse(self) -> None:
        """Answer no."""
        self.dismiss("no")

    def action_move(self, step: int) -> None:
        """Go to the next answer, and no further than the last."""
        buttons = list(self.query(Button))
        at = next((i for i, button in enumerate(buttons) if button.has_focus), 0)
        buttons[min(max(at + step, 0), len(buttons) - 1)].focus()

    def action_scroll(self, step: int) -> None:
        """Scroll what would run by a line."""
        self.query_one(VerticalScroll).scroll_relative(y=step, animate=False)

    def action_page(self, step: int) -> None:
        """Scroll what would run by a page."""
        scroll = self.query_one(VerticalScroll)
        scroll.scroll_relative(y=step * max(1, scroll.size.height - 1), animate=False)
