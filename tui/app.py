"""The chat: an engine, a conversation at a time, and all that can be done with both."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from importlib import import_module
from typing import Any

from rich.text import Text
from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding

from edger1.tui.acts import Acts
from edger1.tui.backend import Backend
from edger1.tui.clean import clean
from edger1.tui.commands_provider import PaletteCommand, provider_of
from edger1.tui.doors import Doors
from edger1.tui.keymap import binding
from edger1.tui.looks import remember
from edger1.tui.session import State
from edger1.tui.themes import COLOURLESS_CSS
from edger1.tui.tree import Node
from edger1.tui.widgets.heading import Heading
from edger1.tui.widgets.key_row import KeyRow
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.prompt_area import PromptArea
from edger1.tui.widgets.question import Question
from edger1.tui.widgets.status import Status
from edger1.tui.widgets.transcript import Transcript
from edger1.tui.widgets.welcome import Welcome

_LOOK_S = 2.0
"""How often to look whether the terminal is still there."""
_SETTLED_S = 0.5
NAME_AFTER_S = 1.5
"""How long the engine has nothing to do before it is asked for a title."""


def _import_answer() -> None:
    import_module("edger1.tui.widgets.answer")


def _commands(app: App[Any]) -> list[PaletteCommand]:
    return app.palette_commands() if isinstance(app, ChatApp) else []


class ChatApp(Doors, Acts, inherit_bindings=False):
    """The screen of the chat. What the engine does is the session's business; this shows it and takes keys."""

    TITLE = "EdgeR1"
    VERTICAL_BREAKPOINTS = [(0, "-short"), (20, "-tall")]  # noqa: RUF012
    BINDINGS = [  # noqa: RUF012
        binding("stop", "stop", "Stop", key_display="esc"),
        binding("new", "new", "New", priority=True),
        binding("conversations", "conversations", "Chats", priority=True),
        binding("models", "models", "Models", priority=True),
        binding("help", "help", "Help"),
        binding("quit", "quit", "Quit", priority=True),
        binding("palette", "command_palette", "Commands", priority=True, show=False),
        binding("thoughts", "toggle_thinking", "Thoughts", priority=True, show=False),
        binding("think", "think", "Think first", priority=True, show=False),
        binding("budget", "budget", "Thinking budget", priority=True, show=False),
        binding("settings", "settings", "Settings", priority=True, show=False),
        binding("tools", "tools", "Tools", priority=True, show=False),
        binding("engine", "engine", "Engine", priority=True, show=False),
        binding("theme", "theme", "Theme", priority=True, show=False),
        binding("messages", "messages", "Messages", show=False),
        binding("regenerate", "retry", "Another answer", priority=True, show=False),
        binding("continue", "continue", "Go on", priority=True, show=False),
        binding("edit", "edit", "Edit", priority=True, show=False),
        binding("previous_branch", "branch(-1)", "The version before", priority=True, show=False),
        binding("next_branch", "branch(1)", "The version after", priority=True, show=False),
        binding("copy_answer", "copy", "Copy the answer", priority=True, show=False),
        # Screens and text boxes take it first where something is selected.
        binding("copy_or_quit", "quit", "Quit", show=False),
    ]
    COMMANDS = App.COMMANDS | {provider_of(_commands)}
    CSS = (
        """
    Screen { background: $background; padding: 0 1; }
    Footer { background: $background; padding: 0 1; }
    Footer FooterKey { background: $background; color: $text-muted; }
    Footer FooterKey .footer-key--key { background: $background; color: $text-primary; }
    """
        + COLOURLESS_CSS
    )

    def compose(self) -> ComposeResult:
        """The conversation above, the text box and two lines below."""
        yield Heading()
        with Transcript(clock=self._clock, opened=self.belongings.thoughts_open, called=self.called):
            yield Welcome(self.session.model or "")
        yield PromptArea()
        yield Status()
        yield KeyRow()

    async def on_mount(self) -> None:
        """Begin to load at once; the text box can be used meanwhile."""
        prompt = self.query_one(Prompt)
        prompt.commands = self.prompt_commands()
        prompt.count = self.session.backend.count_tokens
        prompt.focus()
        for notice in self.notices:
            self.notify(notice, severity="warning", timeout=20, markup=False)
        self.apply_keys()
        self.head()
        self.call_after_refresh(self._painted)

    def _painted(self) -> None:
        self._on_painted()
        self.run_worker(self._begin(), name="begin")
        # Only an answer needs it, and importing it would keep the first screen or the first key waiting.
        self.set_timer(_SETTLED_S, partial(self.run_worker, _import_answer, thread=True))

    async def _begin(self) -> None:
        """Bring back what was left, then load or let a model be chosen."""
        if self.recorder is not None:
            store, prompt = self.recorder.store, self.query_one(Prompt)
            prompt.past = await asyncio.to_thread(store.history)
            if self.resume is not None:
                await self.open_conversation(self.resume)
            else:
                text, attachments = await asyncio.to_thread(store.draft, None)
                if not prompt.draft[0] and not prompt.draft[1]:
                    prompt.restore(text, attachments)
        if self.session.state is State.EMPTY:
            await self.first_run()
        else:
            self.load_soon()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave the keys to a screen that is open over the conversation: priority bindings would overrule its own."""
        return len(self.screen_stack) < 2 or action not in HERE

    # What the user does

    @on(Prompt.Submitted)
    async def take_message(self, event: Prompt.Submitted) -> None:
        """Send a message, or keep it until the engine is free."""
        if self.waiting is not None:
            self.notify("Your last message is still waiting. Esc takes it back.", markup=False)
            return
        if self.session.state in (State.ANSWERING, State.STOPPING) and self.stage.answer is not None:
            self.notify("The answer is still coming. Esc stops it.", markup=False)
            return
        node = Node("user", event.text, attachments=tuple(event.attachments))
        question = self.waiting = self.placing = Question(node, waiting=True)
        self.query_one(Prompt).taken()
        self.keep_draft()
        try:
            await self.leave_welcome()
            # It may have been taken back meanwhile.
            if self.waiting is question:
                await self.stage.transcript.say(question)
        finally:
            self.placing = None
        if self.waiting is not question:
            await self.stage.transcript.drop(question)
        elif self.session.state is State.READY:
            self.ask_soon()
        elif self.session.state is State.ASLEEP:
            self.load_soon()
        elif self.session.state is State.EMPTY:
            self.action_models()

    @on(Prompt.CommandGiven)
    async def take_command(self, event: Prompt.CommandGiven) -> None:
        """Do what a line that begins with a slash asks for."""
        await self.obey(event.name, event.argument)

    @on(Prompt.Drafted)
    def take_draft(self) -> None:
        """Keep what is typed and not sent."""
        self.keep_draft()

    @on(Transcript.Act)
    async def take_act(self, event: Transcript.Act) -> None:
        """Do to a message what the user asks for."""
        await self.act(event)

    @on(Transcript.Left)
    def back_to_prompt(self) -> None:
        """The keyboard goes back to the text box."""
        self.query_one(Prompt).focus()

    async def action_quit(self) -> None:
        """Leave, with what is typed and not sent kept."""
        self.keep_draft()
        await super().action_quit()

    async def action_stop(self) -> None:
        """Stop the answer, or take back a message that waits."""
        if self.waiting is not None:
            await self.take_back(self.waiting)
        elif self.session.stop():
            await self.stage.stop()

    def action_toggle_thinking(self) -> None:
        """Fold or unfold the latest reasoning."""
        from edger1.tui.widgets.answer import Answer

        any(answer.toggle_thinking() for answer in reversed(self.query(Answer)))

    def action_messages(self) -> None:
        """Give the keyboard to the messages."""
        self.stage.transcript.take_keyboard()

    def action_scroll_conversation(self, direction: int) -> None:
        """Scroll a page up (-1) or down (1)."""
        if direction < 0:
            self.stage.transcript.scroll_page_up(animate=False)
        else:
            self.stage.transcript.scroll_page_down(animate=False)

    def _handle_exception(self, error: Exception) -> None:
        # What finds its widgets gone while the chat is closing has nothing to say to anybody.
        if self._exit or self._closing or not self.is_running:
            self.log.error(error)
            return
        super()._handle_exception(error)

    def _fatal_error(self) -> None:
        # Textual would print pages of local variables, and in them what was said.
        if os.environ.get("EDGER1_DEBUG"):
            super()._fatal_error()
            return
        error = self._exception
        kept = "" if self.recorder is None else ' Your conversations are saved; "edger1 chat --continue" goes on.'
        said = f"edger1: The chat failed inside ({type(error).__name__}: {error}). This is a bug.{kept}"
        self._exit_renderables.append(Text(clean(said)))
        self._close_messages_no_wait()


HERE = frozenset(each.action.partition("(")[0] for each in ChatApp.BINDINGS if isinstance(each, Binding))
HERE -= {"quit", "command_palette"}
"""Actions that belong to the conversation, and to no screen over it."""


def run(app: ChatApp, backend: Backend) -> None:
    """Open the chat and return when the user quits; see `edger1.tui.run_chat`."""

    async def session() -> None:
        watch = asyncio.create_task(_end_with_terminal(app))
        begun = app.theme
        try:
            await app.run_async()
        finally:
            watch.cancel()
            if app.theme != begun:
                remember(app.theme)
            # After the screen is given back, so that quitting looks immediate; what was said first.
            if app.recorder is not None:
                await app.recorder.close()
            if app.fetches is not None:
                await app.fetches.close()
            if app.belongings.toolbox is not None:
                await app.belongings.toolbox.close()
            await backend.close()

    asyncio.run(session())
    if app.return_code:
        raise SystemExit(app.return_code)


async def _end_with_terminal(app: ChatApp) -> None:
    """Leave when the terminal has gone: Textual would read its end again and again, and the engine keep its memory."""
    if not os.isatty(0):
        return
    while os.isatty(0):
        await asyncio.sleep(_LOOK_S)
    app.keep_draft()
    app.exit()
