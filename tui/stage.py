"""Draws what happens in a session: messages as they come, what the engine is doing, what an answer cost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from textual.app import App

from edger1.messages import Done, Failed, Progress, Running, Sampled, Text, Thought
from edger1.tools.loop import CallState, RoundsEnd
from edger1.tui.clean import clean
from edger1.tui.engine_history import History
from edger1.tui.figures import memory
from edger1.tui.pacing import spare_collector
from edger1.tui.recalled import notes_of
from edger1.tui.samples import FirstEnded, Voted
from edger1.tui.session import Begun, Ended, Rewound, Session, SessionEvent, State
from edger1.tui.talk import Talk
from edger1.tui.widgets.notice import Notice
from edger1.tui.widgets.question import Question
from edger1.tui.widgets.status import Status
from edger1.tui.widgets.tool_call import CallView
from edger1.tui.widgets.transcript import Transcript

if TYPE_CHECKING:
    from edger1.tui.widgets.answer import Answer

CALLS = {"waiting": "Waiting for your word on {}", "running": "Running {}"}
"""What is said of a call while something is to be waited for, by its stage."""


class Stage:
    """The transcript and the status line, driven by events. Knows neither keys nor what the user wants next."""

    def __init__(self, app: App[None], session: Session, history: History, clock: Callable[[], float]) -> None:
        self._app = app
        self._session = session
        self._history = history
        self._clock = clock
        self.answer: Answer | None = None
        """The answer that is coming."""
        self.failure: Failed | None = None
        """Why the last events ended as they did, where they failed."""
        self._calls: dict[str, CallView] = {}
        self._samples = ""
        """How many of several samples are over, in words."""

    @property
    def transcript(self) -> Transcript:
        """The conversation on the screen."""
        return self._app.query_one(Transcript)

    @property
    def status(self) -> Status:
        """The line below the text box."""
        return self._app.query_one(Status)

    def say(self, state: str) -> None:
        """Tell what the engine is doing; "" for nothing."""
        self.status.state = state

    async def loading(self, name: str, progress: Progress) -> float | None:
        """Tell how far loading is; returns the share that is done."""
        if progress.total <= 0:
            return None
        self.say(f"Loading {name} · {progress.done * 100 // progress.total}% of {memory(progress.total)}")
        return progress.done / progress.total

    async def follow(
        self,
        events: AsyncIterator[SessionEvent],
        talk: Talk,
        *,
        waiting: Question | None = None,
        answer: Answer | None = None,
    ) -> None:
        """Draw until the events end. `waiting` is the question where it is on the screen already, `answer` the answer
        that goes on. What still comes once another conversation is shown is not drawn."""
        spare_collector()
        self.failure, self.answer, self._samples = None, answer, ""
        self.say("Reading")
        async for event in events:
            if not self._app.is_running:
                return
            if self._session.talk is not talk:
                self.answer = None
                continue
            await self._draw(event, waiting)
            # An engine that is faster than the screen must leave the keyboard its turn.
            await asyncio.sleep(0)
        if self._session.talk is talk:
            self.answer = None
            self.say("")

    async def stop(self) -> None:
        """Show at once that the answer has been stopped."""
        from edger1.tui.widgets.answer import REMARKS

        self.say("Stopping")
        if self.answer is not None:
            await self.answer.finish(REMARKS["cancelled"])

    def _unowned(self, done: Done) -> list[str]:
        """Return the notes that no answer keeps: those on several samples together."""
        tree = self._session.tree
        kept = [] if tree.head is None else notes_of(tree[tree.head])
        return [note for note in done.notes if note not in kept]

    async def _draw(self, event: SessionEvent, waiting: Question | None) -> None:
        match event:
            case Rewound():
                await self.transcript.follow(self._session.tree)
            case Begun(node=node) if node.role == "user":
                if waiting is not None and waiting.node is node:
                    waiting.sent()
                else:
                    await self.transcript.say(Question(node))
            case Begun(node=node) if node.role == "assistant":
                from edger1.tui.widgets.answer import Answer

                self.answer = Answer(node, self._clock, coming=True, opened=self.transcript.opened)
                await self.transcript.say(self.answer)
                self.say("Reading")
            case Progress(total=total, done=done) if total > 0:
                self.say(f"Reading · {done:,} of {total:,} tokens")
            case Thought(text=text) if self.answer is not None:
                self.say(self._samples or "Thinking")
                await self.answer.think(text)
            case Text(text=text) if self.answer is not None:
                self.say(self._samples or "Writing")
                await self.answer.feed(text)
            case Running(figures=figures) as running:
                self.status.show(figures, live=True)
                self._history.add(running, time.time())
            case Done() as done:
                self.status.show(done.figures, done.usage)
                for note in self._unowned(done):
                    await self.transcript.say(Notice.remark(note))
            case Failed() as failed:
                self.failure = failed
            case Sampled(done=done, total=of):
                self._samples = f"{done} of {of} done"
                if self._session.state is not State.STOPPING:
                    self.say(self._samples)
            case FirstEnded() if self.answer is not None:
                await self.answer.finish()
            case Voted():
                await self.transcript.follow(self._session.tree)
            case Ended(node=node) if self.answer is not None:
                # Another conversation may be shown meanwhile.
                answer = self.answer
                await answer.finish()
                self._calls = {call.id: CallView(call.name, call.arguments, clock=self._clock) for call in node.calls}
                for view in list(self._calls.values()):
                    await answer.add(view)
            case CallState(call=call, stage=stage, result=result) if call.id in self._calls:
                self.say(CALLS.get(stage, "").format(clean(call.name)))
                if result is None:
                    await self._calls[call.id].show(stage)
                else:
                    await self._calls[call.id].show(stage, result.text, result.seconds)
            case RoundsEnd(rounds=rounds):
                said = f"{rounds} answers in a row asked for tools. Ask again to go on."
                await self.transcript.say(Notice.remark(said))
