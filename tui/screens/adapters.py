"""Which adapter goes over a model that was chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edger1.tui import model_words
from edger1.tui.catalogue import AdapterEntry
from edger1.tui.screens.over import Over
from edger1.tui.widgets.options import Options


@dataclass(frozen=True)
class AdapterChoice:
    """The adapter to use; None for the model as it is."""

    folder: Path | None


class AdaptersScreen(Over[AdapterChoice | None]):
    """Lists the adapters of one model; Esc goes back to the models."""

    BINDINGS = [Binding("escape", "dismiss", "Back")]  # noqa: RUF012
    DEFAULT_CSS = """
    AdaptersScreen {
        align: center middle;
        & > Vertical {
            width: 72;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 1 1;
            .-short & { padding: 0 1; }
            border: round $primary;
            background: $surface;
        }
        & OptionList, & OptionList:focus { border: none; background: $surface; padding: 0; background-tint: $surface; }
        & OptionList > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList:focus > .option-list--option-highlighted { background: $primary 30%; color: $foreground; }
        & OptionList { height: auto; max-height: 70vh; scrollbar-size-vertical: 1; }
    }
    """

    def __init__(self, model: str, entries: list[AdapterEntry]) -> None:
        super().__init__()
        self._model, self._entries = model, entries

    def compose(self) -> ComposeResult:
        """No adapter first, then each."""
        plain = Content.assemble(("No adapter", "bold"), "\n", ("  the model as it is", "$foreground 70%"))
        with Vertical() as box:
            box.border_title = Content(f"Adapter for {model_words.line(self._model)}")
            box.border_subtitle = "Enter takes it · Esc goes back"
            options = [Option(plain), *(Option(model_words.adapter(entry)) for entry in self._entries)]
            yield Options(*options, markup=False)

    @on(OptionList.OptionSelected)
    def choose(self, event: OptionList.OptionSelected) -> None:
        """Take the adapter on which Enter was pressed."""
        event.stop()
        at = event.option_index
        self.dismiss(AdapterChoice(None if at == 0 else self._entries[at - 1].folder))
