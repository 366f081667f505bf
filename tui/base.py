"""What the chat is made of, how it runs the engine, and what it shows of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

from textual import events
from textual.app import App
from textual.css.query import NoMatches
from textual.timer import Timer

from edger1.errors import UsageError
from edger1.messages import AdapterUsed, Failed, Loaded, Progress
from edger1.tools.kinds import Call, Tool
from edger1.tui.backend import Backend
from edger1.tui.belongings import Belongings
from edger1.tui.clean import clean
from edger1.tui.engine_history import History
from edger1.tui.fetches import Fetches
from edger1.tui.figures import held
from edger1.tui.recorder import Recorder
from edger1.tui.session import Session, SessionEvent, State
from edger1.tui.settings import Settings
from edger1.tui.stage import Stage
from edger1.tui.talk import Talk
from edger1.tui.themes import COLOURLESS, DARK, THEMES
from edger1.tui.tree import Node
from edger1.tui.widgets.heading import Heading
from edger1.tui.widgets.notice import Notice
from edger1.tui.widgets.prompt import Prompt, ahead
from edger1.tui.widgets.question import Question
from edger1.tui.widgets.welcome import Welcome

if TYPE_CHECKING:
    from edger1.tui.widgets.answer import Answer

NAME_AFTER_S = 1.5
"""How long the engine has nothing to do before it is asked for a title."""


class ChatBase(App[None], inherit_bindings=False):
    """The chat without keys, commands and layout: they are `ChatApp`'s and those of its other halves."""

    def __init__(
        self,
        backend: Backend,
        model_name: str | None,
        *,
        settings: Settings | None = None,
        adapter: str | None = None,
        theme: str | None = None,
        belongings: Belongings | None = None,
        notices: Sequence[str] = (),
        resume: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_painted: Callable[[], None] = lambda: None,
    ) -> None:
        self.belongings = belongings or Belongings()
        colourless = self.belongings.colourless
        super().__init__(ansi_color=True if colourless else None)
        for own in (*THEMES, *([COLOURLESS] if colourless else []), *self.belongings.themes):
            self.register_theme(own)
        if theme is not None and theme not in self.available_themes:
            names = ", ".join(sorted(self.available_themes))
            raise UsageError(f'There is no theme "{theme}"; choose one of {names}.')
        self.theme = COLOURLESS.name if colourless else theme or DARK.name
        store = self.belongings.store
        self.recorder = None if store is None else Recorder(store, self._complain)
        self.session = Session(
            backend,
            settings,
            model=model_name,
            adapter=adapter,
            recorder=self.recorder,
            tools=self.belongings.toolbox,
            approve=self.approve,
            clock=clock,
        )
        self._clock = clock
        self.fetches = None if self.belongings.catalogue is None else Fetches(self.belongings.catalogue)
        self.history = History()
        self.stage = Stage(self, self.session, self.history, clock)
        self.notices = [*self.belongings.notices, *notices]
        self.resume = resume
        self._on_painted = on_painted
        self.waiting: Question | None = None
        self.placing: Question | None = None
        """The one that waits, while it is put on the screen: whoever does that asks it then."""
        self._name_timer: Timer | None = None

    async def on_event(self, event: events.Event) -> None:
        """Take what a terminal would obey out of what is pasted, wherever it goes."""
        if isinstance(event, events.Paste):
            event.text = clean(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        await super().on_event(event)

    def copy_to_clipboard(self, text: str) -> None:
        """Copy a text, as it may be pasted again."""
        super().copy_to_clipboard(clean(text))

    async def approve(self, call: Call, tool: Tool) -> bool:
        """Return whether a tool may run; nothing may unless somebody can be asked."""
        return False

    def keep_draft(self) -> None:
        """Keep what is typed, and what waits to be asked: until it is, it is in no conversation."""
        if self.recorder is not None:
            text, attachments = self.query_one(Prompt).draft
            if self.waiting is not None:
                asked = self.waiting.node
                text, attachments = ahead(asked.text, text), (*asked.attachments, *attachments)
            self.recorder.save_draft(self.session.talk.id, text, attachments)

    async def action_new(self) -> None:
        """Leave this conversation and begin another. What is typed, or waits, goes along."""
        self.session.stop()
        if self.waiting is not None:
            await self.take_back(self.waiting)
        if self.recorder is not None and self.session.talk.id is not None:
            self.recorder.save_draft(self.session.talk.id, "", ())
        self.session.restart()
        self.leave_talk()
        await self.show_talk()
        self.query_one(Prompt).focus()

    # What the engine does

    def load_soon(self) -> None:
        """Load the chosen model, unless that is under way."""
        if self.session.state is State.ASLEEP:
            # At once, and not when the work begins: a message may be sent between the two.
            self.session.state = State.LOADING
            self.run_worker(self._load(), name="load", group="engine")

    def ask_soon(self) -> None:
        """Ask what waits."""
        if self.waiting is self.placing:
            return
        question, self.waiting = self.waiting, None
        if question is not None:
            self.keep_draft()
            # At once, as for loading: another key may be pressed before the work begins.
            self.session.engage()
            self.run_worker(self._ask(question), name="ask", group="engine")

    async def _load(self) -> None:
        name = self.session.model or ""
        self.stage.say(f"Loading {name}")
        self.greet()
        async with aclosing(self.session.load()) as events:
            async for event in events:
                if not self.is_running:
                    return
                match event:
                    case Progress() as progress:
                        self.greet(await self.stage.loading(name, progress))
                    case Loaded(info=info):
                        self.stage.say("")
                        self.history.clear()
                        prompt = self.query_one(Prompt)
                        prompt.context = info.get("context")
                        prompt.recount()
                        self.greet()
                    case Failed(message=message):
                        await self.fail(f"{name} could not be loaded. {message}")
        if self.session.state is State.READY:
            self.ask_soon()

    async def change_adapter(self, folder: str | None) -> None:
        """Put an adapter over the model, or take it off."""
        self.stage.say("Changing the adapter")
        async with aclosing(self.session.use_adapter(folder)) as events:
            async for event in events:
                if not self.is_running:
                    return
                await self.leave_welcome()
                match event:
                    case AdapterUsed():
                        said = "The model is as it was, without an adapter." if folder is None else f"Adapter {folder}."
                        await self.stage.transcript.say(Notice.remark(said))
                        self.head()
                    case Failed(message=message):
                        await self.fail(message)
        self.stage.say("")
        if self.session.state is State.READY:
            self.ask_soon()

    async def _ask(self, question: Question) -> None:
        talk, node = self.session.talk, question.node
        answered = await self.follow(self.session.ask(node), waiting=question)
        if answered:
            return
        if talk is not self.session.talk:
            await self._leave_to(talk, node)
            return
        # A question that got no word of an answer is typed again, or changed first.
        self.query_one(Prompt).give_back(node.text, node.attachments)
        if self.stage.failure is None and not talk.tree.path():
            await self.show_talk()

    async def _leave_to(self, talk: Talk, asked: Node) -> None:
        """Have a question that got no word of an answer typed again where its conversation is opened again."""
        # Where it is the only message, it is shown: there is none before it that could be.
        if self.recorder is None or talk.id is None or not talk.tree.path():
            return
        await self.recorder.settled()
        text, attachments = await asyncio.to_thread(self.recorder.store.draft, talk.id)
        if talk.id == self.session.talk.id:
            self.query_one(Prompt).give_back(asked.text, asked.attachments)
        else:
            self.recorder.save_draft(talk.id, ahead(asked.text, text), (*asked.attachments, *attachments))

    async def follow(
        self,
        events: AsyncIterator[SessionEvent],
        *,
        waiting: Question | None = None,
        answer: Answer | None = None,
    ) -> bool:
        """Draw an answer to its end, and see to what comes after it; returns whether there is a word of one."""
        talk = self.session.talk
        self._name_later(stop=True)
        await self.leave_welcome()
        async with aclosing(events) as closing:  # type: ignore[type-var]
            await self.stage.follow(closing, talk, waiting=waiting, answer=answer)
        if not self.is_running:
            return True
        answered = waiting is None or waiting.node in talk.tree.path()
        if talk is self.session.talk:
            if self.stage.failure is not None:
                await self.fail(self.stage.failure.message, self._way_out(self.stage.failure))
            self.head()
        self._after_answer(talk)
        return answered

    def _after_answer(self, talk: Talk) -> None:
        if self.session.state is State.READY:
            if self.waiting is not None:
                self.ask_soon()
            elif self.recorder is not None:
                self._name_later()
        elif self.waiting is not None:
            self.load_soon()

    def _name_later(self, stop: bool = False) -> None:
        """Ask for a title once nothing has happened for a while."""
        if self._name_timer is not None:
            self._name_timer.stop()
            self._name_timer = None
        if not stop:
            self._name_timer = self.set_timer(NAME_AFTER_S, self.name_soon)

    def name_soon(self) -> None:
        """Let the model name the conversation, if it has no name."""
        self._name_timer = None
        if self.session.wants_title:
            self.run_worker(self._name_talk(), name="title", group="title")

    async def _name_talk(self) -> None:
        if await self.session.name() is not None:
            self.head()

    def busy(self, what: str) -> bool:
        """Whether an answer is coming, which must end before `what`; says so."""
        if self.session.state in (State.ANSWERING, State.STOPPING):
            self.notify(f"The answer is still coming. Esc stops it, before {what}.", markup=False)
            return True
        return False

    def ready(self) -> bool:
        """Whether a model could answer; says so where none could."""
        if self.session.state is not State.READY:
            self.notify("The model is not loaded yet.", markup=False)
            if self.session.state is State.ASLEEP:
                self.load_soon()
        return self.session.state is State.READY

    # What the screen shows

    async def show_talk(self, at: str | None = None) -> None:
        """Show the session's conversation, from its end or with the message `at` in view."""
        self.waiting = self.stage.answer = None
        self._name_later(stop=True)
        talk, transcript = self.session.talk, self.stage.transcript
        if talk.tree.path():
            await self.leave_welcome()
            await transcript.open(talk.tree, at)
        else:
            await transcript.clear()
            await transcript.mount(Welcome(self.session.model or ""))
        self.stage.status.show(None)
        self.stage.say("")
        self.head()
        self.greet()

    def leave_talk(self) -> None:
        """What was allowed for the conversation that was left holds no longer."""
        if self.belongings.approvals is not None:
            self.belongings.approvals.forget_conversation()

    def head(self) -> None:
        """Bring the line above the conversation up to date, and what is said of its settings."""
        heading = self.query_one(Heading)
        heading.title = self.session.talk.title or ""
        adapter = f" + {Path(self.session.adapter).name}" if self.session.adapter else ""
        heading.model = (self.session.model or "no model") + adapter
        self.stage.status.held = held(self.session.talk.settings)

    def greet(self, loaded: float | None = None) -> None:
        """Bring the empty conversation's words up to date, where it is still empty."""
        try:
            welcome = self.query_one(Welcome)
        except NoMatches:
            return
        loading = self.session.state in (State.LOADING, State.ASLEEP)
        welcome.loaded = (loaded or 0.0) if loading else None
        welcome.hint = "Loading. You can type and send already." if loading else "Ready. Ask anything."
        if self.session.state is State.EMPTY:
            welcome.hint = "Choose a model with F2."

    async def leave_welcome(self) -> None:
        """The conversation is no longer empty."""
        await self.query(Welcome).remove()

    async def take_back(self, question: Question) -> None:
        """Put a message that waits back into the text box."""
        self.waiting = None
        await self.stage.transcript.drop(question)
        self.query_one(Prompt).give_back(question.node.text, question.node.attachments)

    def _way_out(self, failure: Failed) -> str:
        if failure.error != "ContextError" or self.session.talk.settings.context_shift:
            return ""
        return "/shift on drops the oldest turns of this conversation where its context is full."

    async def fail(self, message: str, way_out: str = "") -> None:
        """Show an error and what helps against it, and give a message that waited for the engine back."""
        await self.leave_welcome()
        self.stage.say("")
        if self.session.state is State.ASLEEP:
            advice = "Your conversation is kept. Send a message to start the engine again, or choose another model."
            if self.waiting is not None:
                await self.take_back(self.waiting)
        else:
            advice = f"Your conversation is kept. {way_out or 'Change your message and send it again.'}"
        await self.stage.transcript.say(Notice.error(message, advice))

    def _complain(self, message: str) -> None:
        self.notify(message, title="Not saved", severity="error", timeout=30, markup=False)
