"""A widget that grows with what it shows, and one that does so row by row."""

from __future__ import annotations

from textual.geometry import Region, Size
from textual.reactive import Reactive
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget


class Growing(Widget):
    """Its height follows from its content, so that it asks for a layout itself whenever that changes."""

    # The size of the content is a result of that layout. Textual's widgets ask for another one on account of it, which
    # finds what the first one found, and costs an answer that grows a second time what its new lines cost.
    virtual_size: Reactive[Size] = Reactive(Size(0, 0), layout=False)


class Rows(Growing):
    """Draws rows of text without border or padding, and keeps those that it has drawn.

    Textual's own cache is lost whenever the widget has another size, as it has with each new row.
    """

    def __init__(self, *, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self._strips: dict[int, Strip] = {}
        self._drawn_for: object = None

    def draw(self, y: int, width: int, selection: Selection | None) -> Strip:
        """Draw row `y` as it stands, `width` columns of it; what is selected is marked."""
        raise NotImplementedError

    def forget(self, first: int = 0) -> None:
        """Rows from `first` on have changed."""
        for row in [row for row in self._strips if row >= first]:
            del self._strips[row]

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draw some rows."""
        if not self.is_attached:
            # Taken off the screen between the layout and the drawing of it.
            return [Strip.blank(crop.width)] * crop.height
        strips = [self.render_line(y).crop(crop.x, crop.right) for y in crop.line_range]
        background = self.background_colors[1]
        for each in self.get_line_filters():
            strips = [strip.apply_filter(each, background) for strip in strips]
        return strips

    def render_line(self, y: int) -> Strip:
        """Draw one row of the screen."""
        width, selection = self.content_size.width, self.text_selection
        drawn_for = (width, self.visual_style)
        if drawn_for != self._drawn_for:
            self._strips.clear()
            self._drawn_for = drawn_for
        if selection is not None:
            return self.draw(y, width, selection)
        if y not in self._strips:
            self._strips[y] = self.draw(y, width, None)
        return self._strips[y]

    def notify_style_update(self) -> None:
        """Another theme has other colours."""
        super().notify_style_update()
        self._strips.clear()
