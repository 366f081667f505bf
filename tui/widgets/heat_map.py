"""A map of cells, a row a layer, that is read by its characters and by its colours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.color import Color
from textual.geometry import Size
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

LABEL_WIDTH = 4
EMPTY = -1
"""Level of a cell that has nothing to say."""
LEVELS = 5
SHADES = "·░▒▓█"
DIGITS = "01234"
CHOSEN = "+"


@dataclass(frozen=True)
class Map:
    """What is shown: `level(row, column)` is 0 to LEVELS - 1, or EMPTY."""

    labels: Sequence[str]
    columns: int
    level: Callable[[int, int], int]


NOTHING = Map((), 0, lambda row, column: EMPTY)


@dataclass(frozen=True)
class _Styles:
    label: Style
    levels: tuple[Style, ...]
    chosen: Style


class HeatMap(Widget, can_focus=True):
    """Shows a `Map` around a cell that the arrows and the mouse choose. Draws only what is seen."""

    BINDINGS = [  # noqa: RUF012
        Binding("left", "move(0, -1)", "Left", show=False),
        Binding("right", "move(0, 1)", "Right", show=False),
        Binding("up", "move(-1, 0)", "Up", show=False),
        Binding("down", "move(1, 0)", "Down", show=False),
        Binding("shift+left,ctrl+left", "move(0, -10)", "Left", show=False),
        Binding("shift+right,ctrl+right", "move(0, 10)", "Right", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
    ]
    COMPONENT_CLASSES = {"heat-map--cold", "heat-map--hot", "heat-map--label", "heat-map--chosen"}  # noqa: RUF012
    DEFAULT_CSS = """
    HeatMap {
        height: 1fr;
        width: 1fr;
        & > .heat-map--cold { color: $foreground 45%; }
        & > .heat-map--hot { color: $warning; }
        & > .heat-map--label { color: $foreground-muted; }
        & > .heat-map--chosen { color: $primary; }
    }
    """

    class Chosen(Message):
        """The chosen cell is another."""

        def __init__(self, row: int, column: int) -> None:
            super().__init__()
            self.row = row
            self.column = column

    def __init__(self, *, plain: bool = False) -> None:
        super().__init__()
        self._marks = DIGITS if plain else SHADES
        self._map = NOTHING
        self._top = self._left = 0
        self.row = self.column = 0
        self._styles_of: tuple[tuple[str, Color], _Styles] | None = None

    def show(self, found: Map, *, follow: bool) -> None:
        """Show a map in place of the one there is. `follow`: a cell in the last column stays in the last column."""
        at_end = self.column >= self._map.columns - 1
        self._map = found
        self._choose(self.row, found.columns - 1 if follow and at_end else self.column)

    def to_end(self, last: bool) -> None:
        """Choose a cell in the last or the first column."""
        self._choose(self.row, self._map.columns - 1 if last else 0)

    def action_move(self, rows: int, columns: int) -> None:
        """Choose another cell."""
        self._choose(self.row + rows, self.column + columns)

    def action_page(self, pages: int) -> None:
        """Choose a cell as many rows away as are seen."""
        self._choose(self.row + pages * max(self.size.height - 1, 1), self.column)

    def on_click(self, event: events.Click) -> None:
        """Choose the cell under the mouse."""
        row, column = self._top + event.y, self._left + (event.x - LABEL_WIDTH) // self._cell_width
        if event.x >= LABEL_WIDTH and row < len(self._map.labels) and column < self._map.columns:
            self._choose(row, column)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Go down."""
        event.stop()
        self._choose(self.row + 3, self.column)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Go up."""
        event.stop()
        self._choose(self.row - 3, self.column)

    def on_resize(self) -> None:
        """Keep the chosen cell in sight."""
        self._choose(self.row, self.column)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as there are rows."""
        return max(len(self._map.labels), 1)

    def render_line(self, y: int) -> Strip:
        """Draw one layer."""
        row = self._top + y
        styles = self._styles()
        if row >= len(self._map.labels):
            return Strip.blank(self.size.width, styles.label)
        segments = [Segment(self._map.labels[row].rjust(LABEL_WIDTH - 1) + " ", styles.label)]
        wide = self._cell_width
        chosen = self.column if row == self.row else -1
        levels = (
            (self._map.level(row, column), column == chosen)
            for column in range(self._left, min(self._left + self._columns_seen, self._map.columns))
        )
        # Cells that look the same are one segment: Textual's work is by the segment.
        for (level, is_chosen), run in groupby(levels):
            mark = " " if level == EMPTY else self._marks[level]
            style = styles.levels[max(level, 0)]
            if is_chosen:
                mark, style = mark if self._marks is DIGITS else CHOSEN, styles.chosen
            segments.append(Segment(mark * (wide * len(list(run))), style))
        return Strip(segments).adjust_cell_length(self.size.width, styles.label)

    @property
    def _cell_width(self) -> int:
        return 2 if self._map.columns * 2 <= self.size.width - LABEL_WIDTH else 1

    @property
    def _columns_seen(self) -> int:
        return max((self.size.width - LABEL_WIDTH) // self._cell_width, 1)

    def _styles(self) -> _Styles:
        ground = self.background_colors[1]
        key = (self.app.theme, ground)
        if self._styles_of is None or self._styles_of[0] != key:
            cold, hot, label, chosen = (
                ground + self.get_component_styles(f"heat-map--{name}").color
                for name in ("cold", "hot", "label", "chosen")
            )
            if self.app.native_ansi_color or ground.ansi is not None:
                plain = Style()
                styles = _Styles(plain, (plain,) * LEVELS, Style(reverse=True, bold=True))
            else:
                colours = [cold.blend(hot, level / (LEVELS - 1)) for level in range(LEVELS)]
                styles = _Styles(
                    _style(label, ground),
                    tuple(_style(colour, ground) for colour in colours),
                    _style(ground, chosen) + Style(bold=True),
                )
            self._styles_of = (key, styles)
        return self._styles_of[1]

    def _choose(self, row: int, column: int) -> None:
        self.row = max(0, min(row, len(self._map.labels) - 1))
        self.column = max(0, min(column, self._map.columns - 1))
        height, seen = max(self.size.height, 1), self._columns_seen
        self._top = max(min(self._top, self.row), self.row - height + 1, 0)
        self._top = min(self._top, max(len(self._map.labels) - height, 0))
        self._left = max(min(self._left, self.column), self.column - seen + 1, 0)
        self._left = min(self._left, max(self._map.columns - seen, 0))
        self.refresh()
        self.post_message(self.Chosen(self.row, self.column))


def _style(colour: Color, ground: Color) -> Style:
    return Style(color=colour.rich_color, bgcolor=ground.rich_color)
