"""How attaching and undoing go together: what is attached changes with the text, in one step that can be undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from textual.document._document import EditResult
from textual.document._edit import Edit
from textual.document._history import EditHistory
from textual.widgets import TextArea

from edger1.tui.chips import Chip

if TYPE_CHECKING:
    from edger1.tui.widgets.prompt import Prompt


@dataclass
class ChipEdit(Edit):
    """A change of the text together with the chips."""

    before: tuple[Chip, ...]
    after_it: tuple[Chip, ...]

    def do(self, text_area: TextArea, record_selection: bool = True) -> EditResult:
        """Do it, the first time or again."""
        self._next = self.after_it
        return super().do(text_area, record_selection)

    def undo(self, text_area: TextArea) -> EditResult:
        """Undo both."""
        self._next = self.before
        return super().undo(text_area)

    def after(self, text_area: TextArea) -> None:
        """Change the chips once the text is whole again: who watches them may look at it."""
        super().after(text_area)
        cast("Prompt", text_area).chips = self._next


@dataclass
class PromptHistory(EditHistory):
    """A history that keeps changes of the chips too, each as a step of its own."""

    def record(self, edit: Edit) -> None:
        """Keep an edit that has been done."""
        if not isinstance(edit, ChipEdit):
            super().record(edit)
            return
        self._undo_stack.append([edit])
        self._redo_stack.clear()
        self.checkpoint()
