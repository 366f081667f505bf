"""Which code block of a message to copy."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edger1.tui.clean import clean, tame
from edger1.tui.markdown import Code
from edger1.tui.screens.over import Over
from edger1.tui.widgets.options import Options

SHOWN_MAX = 60


class CopyCode(Over[int | None]):
    """Lists the code blocks by number, language and first line; the result is an index, or None."""

    BINDINGS = [  # noqa: RUF012
        Binding("escape", "dismiss(None)", "Close"),
        *(Binding(str(number), f"choose({number - 1})", show=False) for number in range(1, 10)),
    ]
    DEFAULT_CSS = """
    CopyCode {
        align: center middle;
        & > Vertical {
            width: 70;
            max-width: 100%;
            height: auto;
            max-height: 100%;
            padding: 0 1;
            border: round $primary;
            background: $surface;
        }
        & OptionList { height: auto; max-height: 12; border: none; background: $surface; padding: 0; }
    }
    """

    def __init__(self, blocks: Sequence[Code]) -> None:
        super().__init__()
        self._blocks = blocks

    def compose(self) -> ComposeResult:
        """The list."""
        with Vertical() as box:
            box.border_title = "Copy which code block?"
            yield Options(*(Option(_line(at, code)) for at, code in enumerate(self._blocks)))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take the chosen one."""
        self.dismiss(event.option_index)

    def action_choose(self, at: int) -> None:
        """Take one by its number."""
        if at < len(self._blocks):
            self.dismiss(at)


def _line(at: int, code: Code) -> Content:
    first = next((line.strip() for line in code.text.split("\n") if line.strip()), "")
    rows = code.text.count("\n") + 1
    return Content.assemble(
        (f"{at + 1} ", "$text-primary"),
        tame(clean(first))[:SHOWN_MAX],
        (f"  {clean(code.language)[:20]} · {rows:,} line{'s' if rows > 1 else ''}", "$text-muted"),
    )
