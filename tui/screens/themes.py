"""Choosing a theme: the one under the cursor is shown at once."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.theme import BUILTIN_THEMES
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edger1.tui.contrast import readings
from edger1.tui.screens.over import Over
from edger1.tui.themes import COLOURLESS, THEMES
from edger1.tui.widgets.options import Options


class ThemeScreen(Over[str | None]):
    """Lists the app's themes. Dismissed with the name of the chosen one, or with None: the old one is back then."""

    BINDINGS = [Binding("escape", "leave", "Back")]  # noqa: RUF012
    DEFAULT_CSS = """
    ThemeScreen {
        align: right middle;
        /* What the theme looks like is to be seen behind the list. */
        background: transparent;
        & > Vertical {
            width: 44;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 1;
            border: round $primary;
            background: $surface;
        }
        & OptionList, & OptionList:focus {
            height: auto;
            max-height: 100%;
            border: none;
            padding: 0;
            background: $surface;
            background-tint: transparent;
            scrollbar-size-vertical: 1;
        }
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._before = ""

    def compose(self) -> ComposeResult:
        """The names, the chat's own and the user's first."""
        own = [theme.name for theme in THEMES]
        others = sorted(self.app.available_themes.keys() - {*own, COLOURLESS.name})
        users = [name for name in others if name not in BUILTIN_THEMES]
        names = [*own, *users, *(name for name in others if name in BUILTIN_THEMES)]
        with Vertical() as box:
            box.border_title = "Theme"
            yield Options(*(Option(Content(name), id=name) for name in names))

    def on_mount(self) -> None:
        """Begin at the theme that is shown."""
        self._before = self.app.theme
        options = self.query_one(OptionList)
        at = [option.id for option in options.options]
        options.highlighted = at.index(self._before) if self._before in at else 0
        options.focus()

    @on(OptionList.OptionHighlighted)
    def show_it(self, event: OptionList.OptionHighlighted) -> None:
        """Show the theme under the cursor."""
        assert event.option_id is not None
        self.app.theme = event.option_id
        theme = self.app.available_themes[event.option_id]
        said = "the terminal's colours" if theme.ansi else f"contrast {readings(theme, ('foreground',))[0].ratio:.1f}"
        self.query_one(Vertical).border_subtitle = f"{said} · Enter, Esc"

    @on(OptionList.OptionSelected)
    def take_it(self, event: OptionList.OptionSelected) -> None:
        """Keep the theme."""
        self.dismiss(event.option_id)

    def action_leave(self) -> None:
        """Bring the theme back that was there before."""
        self.app.theme = self._before
        self.dismiss(None)
