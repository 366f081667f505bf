"""What an attachment says."""

from __future__ import annotations

from collections.abc import Iterator

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Log

from edger1.tui.chips import Chip, amount
from edger1.tui.clean import clean
from edger1.tui.screens.over import Over

LINE_CHARACTERS = 500


class AttachmentView(Over[None]):
    """Shows all that a chip holds, to be scrolled."""

    BINDINGS = [Binding("escape,enter,q", "dismiss", "Close")]  # noqa: RUF012
    DEFAULT_CSS = """
    AttachmentView {
        align: center middle;
        & > Vertical {
            width: 100%;
            height: 100%;
            margin: 1 4;
            border: round $primary;
            border-subtitle-color: $text-muted;
            background: $surface;
            .-short & { margin: 0; }
        }
        & Log { background: $surface; padding: 0 1; }
    }
    """

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.chip = chip

    def compose(self) -> ComposeResult:
        """The text in a frame with its name."""
        with Vertical() as box:
            box.border_title = Content(clean(self.chip.name))
            box.border_subtitle = Content(f"{amount(*self.chip.tokens)} tokens · esc close")
            yield Log(highlight=False)

    def on_mount(self) -> None:
        """Fill it."""
        log = self.query_one(Log)
        log.auto_scroll = False
        log.write_lines(self._lines())
        log.focus()

    def _lines(self) -> Iterator[str]:
        for each in self.chip.attachments:
            if len(self.chip.attachments) > 1:
                yield f"── {clean(each.name)}"
            for line in clean(each.text).expandtabs(4).split("\n"):
                # A line of a million characters would be laid out at every scroll.
                for at in range(0, len(line) or 1, LINE_CHARACTERS):
                    yield line[at : at + LINE_CHARACTERS]
