"""One message of either side: what it can be told to do, where its branches are, and changing it in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from textual import events
from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.selection import Selection
from textual.style import Style
from textual.widgets import Static, TextArea

from edger1.tui.clean import clean
from edger1.tui.keymap import keys_of, shown
from edger1.tui.tree import Node
from edger1.tui.widgets.growing import Growing

SAVE_KEYS = ("ctrl+enter", "ctrl+s")
"""Keys that keep an edit, besides the one that sends."""
KEYS: dict[str, tuple[str, str]] = {
    "edit": ("e", "edit"),
    "regenerate": ("r", "again"),
    "continue": ("o", "go on"),
    "copy": ("c", "copy"),
    "copy_code": ("x", "copy code"),
    "branch": ("b", "branch"),
    "figures": ("i", "figures"),
}
"""What a message can be told to do: the key and the word for it, in the order they are shown."""


class CodeCopied(Message):
    """The user wants the text of one code block."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text


class TurnFoot(Static):
    """The line below a message: always its branches, and while it is looked at what it can be told to do."""

    ALLOW_SELECT = False
    DEFAULT_CSS = """
    TurnFoot { height: 1; width: 1fr; color: $text-muted; link-style: none; link-color: $text-muted; }
    """

    def __init__(self) -> None:
        super().__init__(markup=False)
        self.branch = (1, 1)
        """Which alternative this message is, counted from 1, and how many there are."""
        self.votes: Content | None = None
        """How several samples voted."""
        self.actions: Sequence[str] = ()

    def render(self) -> Content:
        """As many whole actions as there is room for; the branches come first, then the votes."""
        at, of = self.branch
        parts: list[Content | str] = []
        width = 0
        if of > 1:
            parts += [_word("‹", "previous"), f" {at}/{of} ", _word("›", "next")]
            width = len(f"‹ {at}/{of} ›")
        if self.votes is not None:
            gap = "   " if parts else ""
            room = self.content_size.width // (2 if self.actions else 1) - width - len(gap)
            votes = self.votes.truncate(max(room, 0), ellipsis=True)
            parts += [gap, votes]
            width += len(gap) + votes.cell_length
        for action in self.actions:
            key, word = KEYS[action]
            gap = "   " if parts else ""
            width += len(gap) + len(key) + 1 + len(word)
            if width > self.content_size.width:
                break
            parts += [gap, _word(key, action, "$text-primary"), " ", _word(word, action)]
        return Content.assemble(*parts)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """Nothing here was said by anybody."""
        return None

    def action_act(self, action: str) -> None:
        """Do what was clicked."""
        self.query_ancestor(Turn).action_act(action)


def _word(text: str, action: str, style: str = "") -> Content:
    content = Content.styled(text, style) if style else Content(text)
    return content.stylize(Style.from_meta({"@click": f"act({action!r})"}))


class Editor(TextArea):
    """A message being changed: Enter keeps it, Esc leaves, Shift+Enter and Ctrl+J begin a new line."""

    DEFAULT_CSS = """
    Editor {
        height: auto;
        min-height: 3;
        padding: 0 1;
        border: round $primary;
        background: $background;
        scrollbar-size-vertical: 1;
        &:focus { border: round $primary; }
        & .text-area--cursor-line { background: transparent; }
    }
    """

    def __init__(self, text: str) -> None:
        super().__init__(clean(text), highlight_cursor_line=False)
        self.cursor_blink = False

    def on_mount(self) -> None:
        """Begin at the end, and leave room for what is around."""
        save, newline = keys_of(self.app, "send")[0], keys_of(self.app, "newline")
        signs = {"enter": "⏎", "ctrl+j": "^j"}
        line = "ctrl+j" if "ctrl+j" in newline else newline[0]
        said = [signs.get(each) or shown(each) for each in (save, line)]
        self.border_subtitle = f"{said[0]} save · {said[1]} new line · esc leave"
        self.styles.max_height = max(3, self.screen.size.height * 45 // 100)
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if event.key in keys_of(self.app, "newline"):
            event.stop()
            event.prevent_default()
            self.insert("\n")
        elif event.key in (*keys_of(self.app, "send"), *SAVE_KEYS):
            event.stop()
            event.prevent_default()
            await self.query_ancestor(Turn).end_edit(self.text)
        elif event.key == "escape":
            event.stop()
            event.prevent_default()
            await self.query_ancestor(Turn).end_edit(None)
        else:
            await super()._on_key(event)


class Turn(Growing, can_focus=True):
    """The part that questions and answers share. Subclasses compose their body and a `TurnFoot` after it."""

    FOCUS_ON_CLICK = False  # a click that selects text must not take the keyboard from the text box
    BINDINGS: ClassVar[list[Any]] = [
        Binding("up,k,shift+tab", "move(-1)", "Up", show=False),
        Binding("down,j,tab", "move(1)", "Down", show=False),
        Binding("left,h", "act('previous')", "Previous branch", show=False),
        Binding("right,l", "act('next')", "Next branch", show=False),
        Binding("home,g", "go('first')", "First message", show=False),
        Binding("end,G", "go('last')", "Last message", show=False),
        Binding("pageup", "page(-1)", "Scroll up", show=False),
        Binding("pagedown", "page(1)", "Scroll down", show=False),
        Binding("escape", "leave", "Back", key_display="esc"),
        Binding("C", "act('copy_all')", "Copy conversation", show=False),
        Binding("enter,space,t", "fold", "Thoughts", show=False),
        *(Binding(key, f"act({action!r})", word.capitalize(), show=False) for action, (key, word) in KEYS.items()),
    ]
    DEFAULT_CSS = """
    Turn {
        height: auto;
        width: 1fr;
        layout: vertical;
        &.-editing > * { display: none; }
        &.-editing > Editor, &.-editing > TurnFoot { display: block; }
    }
    """

    class Asked(Message):
        """The message is to do `action`: one of `KEYS`, "previous", "next" or "copy_all"; `text` is an edit's."""

        def __init__(self, turn: Turn, action: str, text: str | None = None) -> None:
            super().__init__()
            self.turn = turn
            self.action = action
            self.text = text

    class Moved(Message):
        """The keyboard goes `step` messages further, or to the "first" or "last", or a page up or down."""

        def __init__(self, turn: Turn, *, step: int = 0, to: str = "", pages: int = 0) -> None:
            super().__init__()
            self.turn = turn
            self.step = step
            self.to = to
            self.pages = pages

    class Left(Message):
        """The keyboard goes back to the text box."""

    def __init__(self, node: Node, *, classes: str | None = None) -> None:
        super().__init__(classes=classes)
        self.node = node
        self.foot = TurnFoot()
        self._draft: str | None = None

    def possible(self) -> list[str]:
        """Return which of `KEYS` this message can do, in their order."""
        return ["edit", "copy", "branch"]

    def written(self) -> str:
        """Return the message as it was written."""
        return self.node.text

    def show_branch(self, at: int, of: int) -> None:
        """Say which alternative this message is, and how the vote among them went."""
        votes = self.votes()
        if self.foot.branch != (at, of) or self.foot.votes != votes:
            self.foot.branch, self.foot.votes = (at, of), votes
            self.foot.refresh()

    def votes(self) -> Content | None:
        """Return how several samples voted; None where there was no vote."""
        return None

    def look(self) -> None:
        """Bring the line below up to date."""
        if not self.is_attached:
            return
        looked_at = self.has_focus or self.is_mouse_over
        actions = self.possible() if looked_at and not self.has_class("-editing") else ()
        if list(self.foot.actions) != list(actions):
            self.foot.actions = actions
            self.foot.refresh()

    def watch_has_focus(self, _has_focus: bool) -> None:
        """Show what can be done, or go quiet."""
        super().watch_has_focus(_has_focus)
        self.look()

    def on_enter(self) -> None:
        """Show what the mouse can do."""
        self.look()

    def on_leave(self) -> None:
        """Go quiet."""
        self.look()

    async def begin_edit(self) -> None:
        """Change the message in place; what was typed before Esc is still there."""
        if self.has_class("-editing") or not self.foot.is_attached:
            return
        editor = Editor(self.written() if self._draft is None else self._draft)
        self.add_class("-editing")
        await self.mount(editor, before=self.foot)
        editor.focus(scroll_visible=False)
        self.look()

    async def end_edit(self, text: str | None) -> None:
        """Stop changing it; `text` is what it is to say, None leaves it as it is."""
        editor = next(iter(self.query(Editor)), None)
        if editor is None or not self.has_class("-editing"):
            return
        # Also of what is saved: it may have to wait until something else is over.
        self._draft = editor.text
        self.remove_class("-editing")
        await editor.remove()
        self.focus()
        if text is not None and text.strip() and text != self.written():
            self.post_message(self.Asked(self, "edit", text))

    def action_act(self, action: str) -> None:
        """Do one of the actions, where this message can."""
        if action in ("previous", "next"):
            allowed = self.foot.branch[1] > 1
        else:
            allowed = action == "copy_all" or action in self.possible()
        if allowed:
            self.post_message(self.Asked(self, action))

    def action_move(self, step: int) -> None:
        """Go to the message before or after."""
        self.post_message(self.Moved(self, step=step))

    def action_go(self, to: str) -> None:
        """Go to the first or the last message."""
        self.post_message(self.Moved(self, to=to))

    def action_page(self, pages: int) -> None:
        """Scroll by pages."""
        self.post_message(self.Moved(self, pages=pages))

    def action_leave(self) -> None:
        """Go back to the text box."""
        self.post_message(self.Left())

    def action_fold(self) -> None:
        """Fold or unfold what can be folded."""
