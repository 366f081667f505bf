"""What an empty conversation shows: the model, and how far its loading is."""

from __future__ import annotations

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

BAR_WIDTH = 32


class Welcome(Widget):
    """The model's name and a bar while it loads; nothing here moves by itself."""

    DEFAULT_CSS = """
    Welcome {
        height: 1fr;
        content-align: center middle;
        text-align: center;
        color: $text-muted;
    }
    """

    loaded: reactive[float | None] = reactive(None)
    """Share of the model that is loaded, 0 to 1; None where it is not known or not loading."""
    hint: reactive[str] = reactive("")

    def __init__(self, model_name: str) -> None:
        super().__init__()
        self._model_name = model_name

    def render(self) -> Content:
        """The model's name, the bar, the hint."""
        lines = [Content.assemble((self._model_name, "bold $primary"))]
        if self.loaded is not None:
            full = round(self.loaded * BAR_WIDTH)
            lines += [
                Content(""),
                Content.assemble(("━" * full, "$primary"), ("━" * (BAR_WIDTH - full), "$secondary 30%")),
            ]
        lines += [Content(""), Content(self.hint)]
        return Content("\n").join(lines)
