"""Where the user types."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from textual import events
from textual.binding import Binding
from textual.document._document import EditResult, Location, Selection
from textual.document._edit import Edit
from textual.message import Message
from textual.reactive import reactive
from textual.timer import Timer

from edger1.tui import attaching
from edger1.tui.attaching import AttachError, TooLargeError
from edger1.tui.chips import Chip
from edger1.tui.clean import clean
from edger1.tui.keymap import binding, keys_of
from edger1.tui.mentions import Command, command_in, mention, nearest, plain
from edger1.tui.recall import Recall
from edger1.tui.tree import Attachment
from edger1.tui.widgets.prompt_edits import ChipEdit, PromptHistory
from edger1.tui.widgets.text_box import TextBox

PASTE_LINES = 20
PASTE_CHARACTERS = 2_000
"""What is pasted above one of these becomes an attachment."""
TEXT_CHARACTERS = 20_000
LINE_CHARACTERS = 4_000
"""The most that is put into the box, and the longest line of it: wrapping more takes longer than a key may."""
DRAFT_S = 0.5
"""How long after a change the draft is offered for saving."""

Count = Callable[[str], Awaitable[int | None]]


class Assist(Protocol):
    """Something that helps with the text and sees the keys first: a list of files, of commands, of what was typed."""

    @property
    def is_open(self) -> bool:
        """Whether it is shown."""

    def follow(self) -> None:
        """The text or the cursor has changed."""

    def take_key(self, event: events.Key) -> bool:
        """Act on a key while it is open; False: the key means nothing to it."""


class Prompt(TextBox):
    """A text box of several lines: Enter sends, Shift+Enter and Ctrl+J begin a new line, unless the user's keys do.

    `commands`, `past` (what was sent, latest last), `count` (tokens of a text by the loaded model), `context` (tokens
    that it holds) and `root` (the user's working directory) are set from outside.
    """

    BINDINGS = [  # noqa: RUF012
        binding("send", "send", "Send", key_display="⏎"),
        binding("newline", "newline", "New line", key_display="^j"),
        Binding("ctrl+r", "search_history", "Search what was typed", show=False),
        # The conversation scrolls without the focus leaving the text box.
        binding("scroll_up", "app.scroll_conversation(-1)", "Scroll up", show=False),
        binding("scroll_down", "app.scroll_conversation(1)", "Scroll down", show=False),
    ]

    DEFAULT_CSS = """
    Prompt {
        height: auto;
        min-height: 3;
        max-height: 40vh;
        padding: 0 1;
        border: round $secondary 50%;
        background: $background;
        scrollbar-size-vertical: 1;
        &:focus { border: round $primary; }
        & .text-area--cursor-line { background: transparent; }
    }
    """

    chips: reactive[tuple[Chip, ...]] = reactive(())
    context: reactive[int | None] = reactive(None)

    class Submitted(Message):
        """The user wants to send `text` with `attachments`; both stay until `Prompt.taken` or `Prompt.clear`."""

        def __init__(self, text: str, attachments: tuple[Attachment, ...] = ()) -> None:
            super().__init__()
            self.text = text
            self.attachments = attachments

    class CommandGiven(Message):
        """The user gave one of `Prompt.commands`; its text has left the box."""

        def __init__(self, name: str, argument: str) -> None:
            super().__init__()
            self.name = name
            self.argument = argument

    class Drafted(Message):
        """The draft has changed within the last `DRAFT_S`, and may be saved."""

    class AttachmentsWanted(Message):
        """The cursor leaves the text for the row of attachments."""

    def __init__(self) -> None:
        super().__init__(placeholder="Ask anything", highlight_cursor_line=False)
        self.history = PromptHistory(200, 2.0, 100)
        # A blinking cursor is a timer that wakes an idle machine twice a second.
        self.cursor_blink = False
        self.commands: Sequence[Command] = ()
        self.past: list[str] = []
        self.count: Count | None = None
        self.root = Path.cwd()
        self.assists: tuple[Assist, ...] = ()
        self.begin_search: Callable[[], None] | None = None
        self._followed = True
        self._followed_at: Location | None = None
        self._recall: Recall | None = None
        self._draft_timer: Timer | None = None
        self._send_when_read = False
        self._offered = ""
        self._pasted = 0

    # Keys

    async def _on_key(self, event: events.Key) -> None:
        # Bindings are looked up outside the box's own queue of keys: typed fast, an Enter would overtake the letters.
        if self._take_key(event):
            event.stop()
            event.prevent_default()
        else:
            await super()._on_key(event)

    def _take_key(self, event: events.Key) -> bool:
        if not event.is_printable or event.key == "space":
            self._follow()
        if any(assist.is_open and assist.take_key(event) for assist in self.assists):
            return True
        match event.key:
            case key if key in keys_of(self.app, "newline"):
                self.action_newline()
            case key if key in keys_of(self.app, "send"):
                self.action_send()
            case "ctrl+r":
                self.action_search_history()
            case "up":
                if not (self._at_edge(first=True) and self._walk(1)):
                    self.action_cursor_up()
            case "down":
                if not (self._at_edge(first=False) and self._walk(-1)):
                    self.action_cursor_down()
            case "backspace" if self.chips and self.selection.is_empty and self.cursor_at_start_of_text:
                self.post_message(self.AttachmentsWanted())
            case _:
                return False
        return True

    def _at_edge(self, *, first: bool) -> bool:
        """Return whether the cursor is on the first or last line as it is shown, where a long one is wrapped."""
        row = self.wrapped_document.location_to_offset(self.cursor_location).y
        return row == (0 if first else self.wrapped_document.height - 1)

    def action_send(self) -> None:
        """Offer the text for sending, or give the command that it is."""
        text = self.text
        given = command_in(text) if self.commands else None
        if given is not None:
            self._give(given.name, (given.argument or "").strip())
            return
        if not text.strip() and not self.chips:
            return
        if undecided := next((chip for chip in self.chips if chip.offer is not None), None):
            self.notify(f"{undecided.name} is too large to attach whole. Choose above the text.", markup=False)
            self.post_message(self.AttachmentsWanted())
            return
        self._offered = text
        self._send_when_read = any(chip.reading for chip in self.chips)
        if not self._send_when_read:
            self.post_message(self.Submitted(plain(text.strip()) if self.commands else text.strip(), self.draft[1]))

    def _give(self, name: str, argument: str) -> None:
        names = [command.name for command in self.commands]
        if name in names:
            self._remember(self.text)
            self._change("")
            self.post_message(self.CommandGiven(name, argument))
        else:
            self.notify(unknown(name, names), severity="warning", markup=False)

    def action_newline(self) -> None:
        """Begin a new line."""
        self._replace_via_keyboard("\n", *self.selection)

    def action_search_history(self) -> None:
        """Search what was typed before."""
        if self.begin_search is not None:
            self.begin_search()

    # What was typed before

    def _walk(self, back: int) -> bool:
        """Show what was sent before (1) or after (-1) what is shown; False where there is nothing."""
        recall = self._recall
        if recall is None:
            if back < 0:
                return False
            recall = Recall(self.past, self.text)
        shown = recall.step(back)
        if shown is None:
            return self._recall is not None
        if self._recall is not None:
            # Each step is a change of the draft and not of the step before: one undo brings it back.
            self.undo()
        if shown != recall.draft:
            self._change(clean(shown))
            # At the line from which the next step goes on.
            if back > 0:
                self.move_cursor((0, len(self.document[0])))
        self._recall = recall if shown != recall.draft else None
        return True

    def _remember(self, text: str) -> None:
        if text.strip() and (not self.past or self.past[-1] != text):
            self.past.append(text)

    def taken(self) -> None:
        """The message has been taken: remember it, and empty the row and the box but for what was typed since."""
        text = self.text
        self._remember(self._offered)
        self._change(text.removeprefix(self._offered) if text.startswith(self._offered) else "", ())

    # Changes

    def edit(self, edit: Edit) -> EditResult:
        """Change the text; the help for it follows before the next key is acted on."""
        self._recall = None
        self._followed = self._send_when_read = False
        return super().edit(edit)

    def undo(self) -> None:
        """Undo the latest step, be it of the text or of what is attached."""
        self._before_redoing()
        super().undo()

    def redo(self) -> None:
        """Do again what was undone."""
        self._before_redoing()
        super().redo()

    def _before_redoing(self) -> None:
        self._recall = None
        self._followed = False
        # The box looks for its cursor before it is moved, where there may be no line any more.
        self.selection = Selection.cursor((0, 0))

    def clear(self) -> EditResult:
        """Remove the text and the attachments, in one step."""
        return self._change("", ())

    def replace_all(self, text: str) -> None:
        """Put `text` in the place of the whole text, in one step that can be undone."""
        self._change(text)

    def _change(self, text: str, chips: tuple[Chip, ...] | None = None) -> EditResult:
        """Put `text` in the place of all there is."""
        return self._change_part(text, (0, 0), self.document.end, self.chips if chips is None else chips)

    def _change_part(self, text: str, start: Location, end: Location, chips: tuple[Chip, ...]) -> EditResult:
        return self.edit(ChipEdit(text, start, end, False, self.chips, chips))

    def on_text_area_changed(self) -> None:
        """Help with the text as it is, and see to its being saved."""
        # What was typed is on the screen before a list is laid out.
        self.call_after_refresh(self._follow)
        self._draft_soon()

    def on_text_area_selection_changed(self) -> None:
        """Help with what the cursor stands in."""
        if self.cursor_location != self._followed_at:
            self._followed = False
            self.call_after_refresh(self._follow)

    def watch_chips(self) -> None:
        """The attachments are part of the draft."""
        self._draft_soon()

    def _follow(self) -> None:
        if not self._followed:
            self._followed = True
            self._followed_at = self.cursor_location
            for assist in self.assists:
                assist.follow()

    # Drafts

    def _draft_soon(self) -> None:
        # The first change starts the clock, not the last: who types without a pause loses no more than others.
        if self._draft_timer is None and self.is_mounted:
            self._draft_timer = self.set_timer(DRAFT_S, self._offer_draft)

    def _offer_draft(self) -> None:
        self._draft_timer = None
        self.post_message(self.Drafted())

    @property
    def draft(self) -> tuple[str, tuple[Attachment, ...]]:
        """The text as it stands and what is attached; what is still being read is no part of it."""
        return self.text, tuple(each for chip in self.chips for each in chip.attachments)

    def restore(self, text: str, attachments: Sequence[Attachment] = ()) -> None:
        """Begin from a draft; nothing before it can be undone."""
        self._recall = None
        self._followed = self._send_when_read = False
        self.load_text(clean(text))
        self.chips = tuple(Chip(each.name, (each,)) for each in attachments)
        self.move_cursor(self.document.end)
        self.recount()

    def give_back(self, text: str, attachments: Sequence[Attachment] = ()) -> None:
        """Put a message that was not answered back, before what has been typed since."""
        returned = tuple(Chip(each.name, (each,)) for each in attachments)
        self._change(ahead(text, self.text), returned + self.chips)
        self.recount()

    # Pasting

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        self.paste(event.text)
        self.focus()

    def action_paste(self) -> None:
        """Paste what was copied in the chat."""
        self.paste(self.app.clipboard)

    def paste(self, text: str) -> None:
        """Insert a text, or attach it where it is long."""
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if len(text) > PASTE_CHARACTERS or text.count("\n") >= PASTE_LINES + bool(text.endswith("\n")):
            self._pasted += 1
            chip = Chip(f"Pasted text {self._pasted}", (Attachment(f"Pasted text {self._pasted}", text),))
            self._change_part("", *self.selection, (*self.chips, chip))
            self._count_soon(chip)
        elif text:
            self._replace_via_keyboard(clean(text), *self.selection)

    # Attachments

    def attach(self, path: Path, begin: int | None = None) -> None:
        """Read a file or directory as an attachment, and let the text name it.

        With `begin`, the column of the cursor's line where an `@` stands, its name replaces what was typed from there.
        """
        name = attaching.shown_name(path, self.root)
        chip = Chip(name, path=path, reading=True)
        row, column = self.cursor_location
        line = self.document[row]
        # The text goes on behind the name; where it already does there is no second space.
        gap = "" if line[column : column + 1].isspace() else " "
        start = (row, column if begin is None else begin)
        self._change_part(mention(name) + gap, start, (row, column), (*self.chips, chip))
        self.run_worker(self._read(chip), group="attach", exit_on_error=False)

    def detach(self, chip: Chip) -> None:
        """Remove an attachment."""
        kept = tuple(each for each in self.chips if each is not chip)
        self._change_part("", self.cursor_location, self.cursor_location, kept)

    def put_into_text(self, chip: Chip) -> bool:
        """Put what a chip holds into the text, at the cursor, and the chip away; False: it is too much for the box."""
        text = clean("\n\n".join(each.text for each in chip.attachments))
        longest = max(map(len, text.split("\n")))
        if not chip.attachments or len(text) + len(self.text) > TEXT_CHARACTERS or longest > LINE_CHARACTERS:
            self.notify(f"{chip.name} is too long for the text box; it stays attached.", markup=False)
            return False
        kept = tuple(each for each in self.chips if each is not chip)
        self._change_part(text, *self.selection, kept)
        return True

    def accept_offer(self, chip: Chip) -> None:
        """Attach the part that is offered of something too large."""
        chip.offer, chip.reading = None, True
        self.mutate_reactive(Prompt.chips)
        self.run_worker(self._read(chip, cut=True), group="attach", exit_on_error=False)

    async def _read(self, chip: Chip, cut: bool = False) -> None:
        assert chip.path is not None
        try:
            attached = await asyncio.to_thread(attaching.read, chip.path, root=self.root, cut=cut)
        except TooLargeError as error:
            chip.offer = error.offer
            self.notify(str(error), title="Too large", severity="warning", markup=False)
        except AttachError as error:
            self._refuse(chip, str(error))
        except Exception as error:
            # A file system can fail in ways that nobody foresees; the text must not go with it.
            self._refuse(chip, f"{chip.name} cannot be read ({type(error).__name__}: {error}).")
        else:
            chip.attachments = attached.attachments
            for note in attached.notes:
                self.notify(clean(note), markup=False)
        chip.reading = False
        self.mutate_reactive(Prompt.chips)
        if chip.attachments:
            self._count_soon(chip)
        if self._send_when_read and not any(each.reading for each in self.chips):
            self._send_when_read = False
            if not chip.refused:
                self.action_send()

    def _refuse(self, chip: Chip, why: str) -> None:
        chip.refused = True
        self.chips = tuple(each for each in self.chips if each is not chip)
        self.notify(clean(why), title="Not attached", severity="warning", markup=False)

    def validate_chips(self, chips: tuple[Chip, ...]) -> tuple[Chip, ...]:
        """Undoing does not bring back what could not be read."""
        return tuple(chip for chip in chips if not chip.refused)

    def recount(self) -> None:
        """Count the tokens again, as another model has been loaded."""
        for chip in self.chips:
            self._count_soon(chip)

    def _count_soon(self, chip: Chip) -> None:
        if self.count is not None:
            self.run_worker(self._count(chip, self.count), group="count", exit_on_error=False)

    async def _count(self, chip: Chip, count: Count) -> None:
        counted = [replace(each, tokens=await count(each.text)) for each in chip.attachments]
        chip.attachments = tuple(counted)
        self.mutate_reactive(Prompt.chips)


def ahead(text: str, draft: str) -> str:
    """Return a text that was sent in front of what has been typed since."""
    return f"{text}\n\n{draft}" if draft.strip() else text


def unknown(name: str, names: Sequence[str]) -> str:
    """Return what to say of a command that there is not."""
    meant = nearest(name, list(names))
    hint = f" Did you mean /{meant}?" if meant else ""
    return f"There is no command /{clean(name)}.{hint} // sends a text that begins with a slash."
