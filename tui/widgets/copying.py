"""Copying what was said: a message, a block of its code, a whole conversation."""

from __future__ import annotations

from collections.abc import Iterable

from textual import on
from textual.widget import Widget

from edger1.tui.clean import clean
from edger1.tui.tree import Node
from edger1.tui.widgets.turn import CodeCopied, Turn

_NAMES = {"user": "You", "assistant": "Answer"}


def as_markdown(nodes: Iterable[Node]) -> list[str]:
    """Return each message that has words as Markdown, without reasoning and without what tools said."""
    return [
        f"## {_NAMES[node.role]}\n\n{node.text.strip()}\n"
        for node in nodes
        if node.role in _NAMES and node.text.strip()
    ]


class Copying(Widget):
    """The part of a widget that holds messages which copies what they say, and tells how much that was."""

    def copy(self, text: str, what: str) -> None:
        """Copy a text; `what` is said of it."""
        text = clean(text)
        self.app.copy_to_clipboard(text)
        self.notify(f"Copied {what}: {len(text):,} characters.", markup=False)

    def copy_code(self, turn: Turn) -> None:
        """Copy the code block of a message, the one that is chosen where there are several."""
        from edger1.tui.markdown import code_blocks
        from edger1.tui.screens.copy_code import CopyCode

        blocks = code_blocks(turn.written())
        if len(blocks) == 1:
            self.copy(blocks[0].text, "the code block")
        elif blocks:

            def chosen(at: int | None) -> None:
                if at is not None:
                    self.copy(blocks[at].text, f"code block {at + 1} of {len(blocks)}")

            self.app.push_screen(CopyCode(blocks), chosen)

    @on(CodeCopied)
    def _copy_block(self, event: CodeCopied) -> None:
        event.stop()
        self.copy(event.text, "the code block")
