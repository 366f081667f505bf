"""What goes with the message, above the text."""

from __future__ import annotations

from textual import events
from textual.binding import Binding
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from edger1.tui.chips import Chip, Piece, lay_out, too_many, total
from edger1.tui.widgets.attachment_view import AttachmentView
from edger1.tui.widgets.prompt import Prompt


class AttachmentRow(Widget, can_focus=True):
    """One line of chips. With the focus: arrows choose, Enter opens, t puts into the text, x removes.

    The mouse opens a chip, and removes it where its cross is clicked.
    """

    BINDINGS = [  # noqa: RUF012
        Binding("left", "step(-1)", "Previous", show=False),
        Binding("right", "step(1)", "Next", show=False),
        Binding("enter,space", "open", "Open", key_display="⏎"),
        Binding("t", "put_into_text", "Into the text"),
        Binding("x,delete", "remove", "Remove"),
        Binding("ctrl+z", "undo", "Undo", show=False),
        Binding("escape,down,up", "leave", "Back", show=False),
    ]
    DEFAULT_CSS = """
    AttachmentRow {
        display: none;
        height: 1;
        padding: 0 1;
        color: $text-muted;
        &.-filled { display: block; }
    }
    """
    selected: reactive[int] = reactive(0)

    def __init__(self, prompt: Prompt) -> None:
        super().__init__()
        self.prompt = prompt

    def on_mount(self) -> None:
        """Follow what is attached."""
        self.watch(self.prompt, "chips", self._changed)
        self.watch(self.prompt, "context", self._changed, init=False)

    def _changed(self) -> None:
        chips = self.prompt.chips
        self.selected = max(0, min(self.selected, len(chips) - 1))
        self.set_class(bool(chips), "-filled")
        if not chips and self.has_focus:
            self.prompt.focus()
        self.refresh()

    def on_focus(self) -> None:
        """Begin at the one that waits for a choice, else at the last."""
        chips = self.prompt.chips
        self.selected = next((at for at, chip in enumerate(chips) if chip.offer is not None), len(chips) - 1)
        self.refresh()

    def on_blur(self) -> None:
        """No chip is chosen without the focus."""
        self.refresh()

    @property
    def chip(self) -> Chip | None:
        """The chosen chip."""
        chips = self.prompt.chips
        return chips[self.selected] if 0 <= self.selected < len(chips) else None

    def _side(self) -> str:
        """Return what stands at the right: what the keys do, or what all of it costs."""
        if self.has_focus and self.chip is not None:
            if self.chip.offer is not None:
                return f"⏎ attach {self.chip.offer} · x leave it"
            return "⏎ open · t into text · x remove"
        return total(self.prompt.chips, self.prompt.context)

    def _pieces(self) -> tuple[list[Piece], int]:
        """Lay the chips out in the room that the right side leaves."""
        chips, selected = self.prompt.chips, self.selected if self.has_focus else 0
        room = max(12, self.content_size.width - Content(self._side()).cell_length - 2)
        pieces, hidden = lay_out(chips, selected, room)
        return lay_out(chips, selected, max(12, room - 5)) if hidden else (pieces, 0)

    def render(self) -> Content:
        """The chips that there is room for, and at the right their tokens against the context."""
        chips, width = self.prompt.chips, self.content_size.width
        pieces, hidden = self._pieces()
        line = Content("")
        for piece in pieces:
            chosen = self.has_focus and piece.index == self.selected
            offered = chips[piece.index].offer is not None
            style = "bold reverse" if chosen else "$text-warning" if offered else "$text-primary"
            line = Content.assemble(line, " " * (piece.begin - line.cell_length), (piece.text, style))
        if hidden:
            line = Content.assemble(line, f" +{hidden}")
        side = Content(self._side())
        if not self.has_focus and too_many(chips, self.prompt.context):
            side = Content("too many: ").append(side).stylize("bold $text-error")
        room = width - line.cell_length - 1
        if side.cell_length > room:
            side = side.truncate(max(0, room), ellipsis=True)
        return Content.assemble(line, " " * (width - line.cell_length - side.cell_length), side)

    def on_click(self, event: events.Click) -> None:
        """Open the chip, or remove it at its cross."""
        at = event.get_content_offset(self)
        if at is None:
            return
        for piece in self._pieces()[0]:
            if piece.begin <= at.x < piece.end:
                chip = self.prompt.chips[piece.index]
                self.selected = piece.index
                if at.x >= piece.cross:
                    self.prompt.detach(chip)
                    self.prompt.focus()
                else:
                    self.action_open()

    def action_step(self, step: int) -> None:
        """Choose another chip."""
        self.selected = max(0, min(self.selected + step, len(self.prompt.chips) - 1))

    def action_open(self) -> None:
        """Show what the chip holds, or take the part of it that is offered."""
        chip = self.chip
        if chip is None or chip.reading:
            return
        if chip.offer is not None:
            self.prompt.accept_offer(chip)
            self.prompt.focus()
        else:
            self.app.push_screen(AttachmentView(chip))

    def action_put_into_text(self) -> None:
        """Make it part of the text again."""
        if self.chip is not None and not self.chip.reading and self.prompt.put_into_text(self.chip):
            self.prompt.focus()

    def action_remove(self) -> None:
        """Remove it."""
        if self.chip is not None:
            self.prompt.detach(self.chip)

    def action_undo(self) -> None:
        """Undo, as in the text."""
        self.prompt.undo()

    def action_leave(self) -> None:
        """Go back to the text."""
        self.prompt.focus()
