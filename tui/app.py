"""The chat: one model, one conversation."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import aclosing

from textual import on
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.css.query import NoMatches
from textual.widgets import Footer

from edger1.errors import UsageError
from edger1.messages import AdapterUsed, Done, Failed, Loaded, Progress, Text, Thought
from edger1.tui.backend import Backend
from edger1.tui.figures import figures, memory
from edger1.tui.session import Session, State
from edger1.tui.themes import DARK, THEMES
from edger1.tui.widgets.answer import Answer
from edger1.tui.widgets.help import Help
from edger1.tui.widgets.notice import Notice
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.question import Question
from edger1.tui.widgets.status import Status
from edger1.tui.widgets.transcript import Transcript
from edger1.tui.widgets.welcome import Welcome

_LOOK_S = 2.0
"""How often to look whether the terminal is still there."""
ADAPTER = "/adapter"
REMARKS = {"cancelled": "Stopped.", "length": "Stopped at the limit of length."}


class ChatApp(App[None], inherit_bindings=False):
    """The screen of the chat. What the engine does is the session's business; this shows it and takes keys."""

    TITLE = "EdgeR1"
    VERTICAL_BREAKPOINTS = [(0, "-short"), (20, "-tall")]  # noqa: RUF012
    BINDINGS = [  # noqa: RUF012
        Binding("escape", "stop", "Stop", key_display="esc"),
        Binding("ctrl+n", "new", "New", priority=True),
        Binding("f1", "help", "Help"),
        Binding("ctrl+q", "quit", "Quit", priority=True),
        Binding("ctrl+t", "toggle_thinking", "Thoughts", priority=True),
        # Screens and text boxes take Ctrl+C first where something is selected.
        Binding("ctrl+c", "quit", "Quit", show=False),
    ]
    CSS = """
    Screen { background: $background; padding: 0 1; }
    Footer { background: $background; padding: 0 1; }
    Footer FooterKey { background: $background; color: $text-muted; }
    Footer FooterKey .footer-key--key { background: $background; color: $text-primary; }
    """

    def __init__(
        self,
        backend: Backend,
        model_name: str,
        *,
        system: str | None = None,
        theme: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        for own in THEMES:
            self.register_theme(own)
        if theme is not None and theme not in self.available_themes:
            names = ", ".join(sorted(self.available_themes))
            raise UsageError(f'There is no theme "{theme}"; choose one of {names}.')
        self.theme = theme or DARK.name
        self.session = Session(backend, system)
        self._model_name = model_name
        self._clock = clock
        self._waiting: Question | None = None
        self._answer: Answer | None = None

    def compose(self) -> ComposeResult:
        """The conversation above, the text box and two lines below."""
        with Transcript():
            yield Welcome(self._model_name)
        yield Prompt()
        yield Status()
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Begin to load at once; the text box can be used meanwhile."""
        self.query_one(Prompt).focus()
        self._load_soon()

    # What the user does

    @on(Prompt.Submitted)
    async def take_message(self, event: Prompt.Submitted) -> None:
        """Send a message, or keep it until the engine is free."""
        prompt = self.query_one(Prompt)
        if self._waiting is not None:
            self.notify("Your last message is still waiting. Esc takes it back.", markup=False)
            return
        if self.session.state is State.ANSWERING:
            self.notify("The answer is still coming. Esc stops it.", markup=False)
            return
        words = event.text.split(maxsplit=1)
        if words[0] == ADAPTER:
            await self._take_adapter(words[1] if len(words) > 1 else "")
            return
        prompt.clear()
        await self._leave_welcome()
        self._waiting = Question(event.text, waiting=True)
        await self._transcript.say(self._waiting)
        if self.session.state is State.READY:
            self._ask_soon()
        elif self.session.state is State.ASLEEP:
            self._load_soon()

    async def _take_adapter(self, folder: str) -> None:
        """Do what `/adapter DIR` and `/adapter off` ask for."""
        if not folder:
            self.notify(f"Give a folder, as in {ADAPTER} runs/mine/adapter, or {ADAPTER} off.", markup=False)
        elif self.session.state is not State.READY:
            self.notify("The model is not loaded yet.", markup=False)
        else:
            self.query_one(Prompt).clear()
            self.run_worker(self._use_adapter(None if folder == "off" else folder), name="adapter")

    async def action_stop(self) -> None:
        """Stop the answer, or take back a message that waits."""
        if self._waiting is not None:
            await self._take_back(self._waiting)
        elif self.session.stop() and self._answer is not None:
            self._say("Stopping")
            await self._answer.finish(REMARKS["cancelled"])

    async def action_new(self) -> None:
        """Leave this conversation and begin another."""
        self.session.stop()
        self.session.restart()
        self._waiting = self._answer = None
        await self._transcript.remove_children()
        await self._transcript.mount(Welcome(self._model_name))
        self.query_one(Status).figures = ()
        self._say("")
        self._greet()
        self.query_one(Prompt).focus()

    def action_toggle_thinking(self) -> None:
        """Fold or unfold the latest reasoning."""
        any(answer.toggle_thinking() for answer in reversed(self.query(Answer)))

    def action_scroll_conversation(self, direction: int) -> None:
        """Scroll a page up (-1) or down (1)."""
        if direction < 0:
            self._transcript.scroll_page_up(animate=False)
        else:
            self._transcript.scroll_page_down(animate=False)

    def action_help(self) -> None:
        """Show the keys."""
        self.push_screen(Help())

    # What the engine does

    def _load_soon(self) -> None:
        self.run_worker(self._load(), name="load")

    def _ask_soon(self) -> None:
        question, self._waiting = self._waiting, None
        if question is not None:
            self.run_worker(self._ask(question), name="ask")

    async def _load(self) -> None:
        self._say(f"Loading {self._model_name}")
        self._greet()
        async with aclosing(self.session.load()) as events:
            async for event in events:
                if not self.is_running:
                    return
                match event:
                    case Progress(total=total, done=done) if total > 0:
                        self._say(f"Loading {self._model_name} · {done * 100 // total}% of {memory(total)}")
                        self._greet(done / total)
                    case Loaded():
                        self._say("")
                        self._greet()
                    case Failed(message=message):
                        await self._fail(f"The model could not be loaded. {message}")
        if self.session.state is State.READY:
            self._ask_soon()

    async def _use_adapter(self, folder: str | None) -> None:
        self._say("Changing the adapter")
        async with aclosing(self.session.use_adapter(folder)) as events:
            async for event in events:
                if not self.is_running:
                    return
                await self._leave_welcome()
                match event:
                    case AdapterUsed():
                        said = "The model is as it was, without an adapter." if folder is None else f"Adapter {folder}."
                        await self._transcript.say(Notice.remark(said))
                    case Failed(message=message):
                        await self._fail(message)
        self._say("")
        if self.session.state is State.READY:
            self._ask_soon()

    async def _ask(self, question: Question) -> None:
        question.sent()
        answer = self._answer = Answer(self._clock)
        await self._transcript.say(answer)
        self._say("Reading")
        async with aclosing(self.session.ask(question.text)) as events:
            async for event in events:
                if not self.is_running:
                    return
                if answer is not self._answer:
                    # A new conversation has begun; what still comes belongs to none.
                    continue
                match event:
                    case Progress(total=total, done=done) if total > 0:
                        self._say(f"Reading · {done:,} of {total:,} tokens")
                    case Thought(text=text):
                        self._say("Thinking")
                        await answer.think(text)
                    case Text(text=text):
                        self._say("Writing")
                        await answer.feed(text)
                    case Done() as done:
                        await answer.finish(REMARKS.get(done.finish_reason, ""))
                        self.query_one(Status).figures = tuple(figures(done))
                    case Failed(message=message):
                        await answer.finish()
                        await self._fail(message)
                # An engine that is faster than the screen must leave the keyboard its turn.
                await asyncio.sleep(0)
        if answer is self._answer:
            self._answer = None
            self._say("")
            if not self.session.kept:
                self.query_one(Prompt).give_back(question.text)
        if self.session.state is State.READY:
            self._ask_soon()
        elif self._waiting is not None:
            self._load_soon()

    # What the screen shows

    @property
    def _transcript(self) -> Transcript:
        return self.query_one(Transcript)

    def _say(self, state: str) -> None:
        self.query_one(Status).state = state

    def _greet(self, loaded: float | None = None) -> None:
        """Bring the empty conversation's words up to date, where it is still empty."""
        try:
            welcome = self.query_one(Welcome)
        except NoMatches:
            return
        loading = self.session.state in (State.LOADING, State.ASLEEP)
        welcome.loaded = (loaded or 0.0) if loading else None
        welcome.hint = "Loading. You can type and send already." if loading else "Ready. Ask anything."

    async def _leave_welcome(self) -> None:
        await self.query(Welcome).remove()

    async def _take_back(self, question: Question) -> None:
        self._waiting = None
        await question.remove()
        self.query_one(Prompt).give_back(question.text)

    async def _fail(self, message: str) -> None:
        """Show an error, and give a message that waited for the engine back."""
        await self._leave_welcome()
        self._say("")
        if self.session.state is State.ASLEEP:
            advice = "Your conversation is kept. Send a message to start the engine again."
        else:
            advice = "Your conversation is kept. Change your message and send it again."
        if self._waiting is not None and self.session.state is State.ASLEEP:
            await self._take_back(self._waiting)
        await self._transcript.say(Notice.error(message, advice))


def run(backend: Backend, model_name: str, *, system: str | None = None, theme: str | None = None) -> None:
    """Open the chat and return when the user quits; see `edger1.tui.run_chat`."""
    app = ChatApp(backend, model_name, system=system, theme=theme)

    async def session() -> None:
        watch = asyncio.create_task(_end_with_terminal(app))
        try:
            await app.run_async()
        finally:
            watch.cancel()
            # After the screen is given back, so that quitting looks immediate.
            await backend.close()

    asyncio.run(session())


async def _end_with_terminal(app: ChatApp) -> None:
    """Leave when the terminal has gone: Textual would read its end again and again, and the engine keep its memory."""
    if not os.isatty(0):
        return
    while os.isatty(0):
        await asyncio.sleep(_LOOK_S)
    app.exit()
