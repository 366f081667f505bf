"""An engine that answers from a script: for the chat's tests and for the pictures in the documentation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

from edger1.messages import (
    AdapterUsed,
    Done,
    Event,
    Failed,
    Figures,
    Loaded,
    Message,
    OfSample,
    Progress,
    Sampled,
    Text,
    Thought,
    Usage,
)
from edger1.tui.settings import Settings

HOLD = "hold"
"""A step of a script: wait for `release`, or for a cancel."""

GONE = Failed("", "EngineError", "The engine was killed by the system, most likely because memory ran out.")

Step = Event | Exception | str

FIGURES = Done(
    "",
    "stop",
    Usage(prompt_tokens=352, cached_tokens=340, prefilled_tokens=12, completion_tokens=96),
    Figures(
        prefill_tokens_per_s=410.0,
        decode_tokens_per_s=48.26,
        time_to_first_token_s=0.214,
        peak_memory_bytes=412_000_000,
        context_used=448,
        accounted_memory_bytes=380_000_000,
        ceiling_bytes=4_000_000_000,
        context_size=8192,
    ),
)


def words(text: str, kind: type[Text] | type[Thought] = Text) -> list[Event]:
    """A text in pieces of about a token each."""
    return [kind("", text[at : at + 4]) for at in range(0, len(text), 4)]


class FakeBackend:
    """Plays one script for each load and each question; the last script is played again for what comes after.

    One that is cancelled ends with its last step where that is a cancelled Done, else with a plain one.
    """

    def __init__(
        self,
        *answers: Iterable[Step],
        loads: Iterable[Iterable[Step]] = ((Progress("", "load", 49_000_000, 98_000_000), Loaded("", "smollm2")),),
        pace_s: float = 0.0,
    ) -> None:
        self.answers = [list(answer) for answer in answers] or [[Text("", "Hello."), FIGURES]]
        self.loads = [list(load) for load in loads]
        self.pace_s = pace_s
        self.asked: list[list[Message]] = []
        self.settings: list[Settings] = []
        """What each question was asked under; `tools` and `continued` likewise."""
        self.tools: list[list[dict[str, Any]]] = []
        self.continued: list[bool] = []
        self.chosen: list[tuple[str, Path, str | None]] = []
        self.loaded = False
        self.adapters: list[str | None] = []
        self.load_count = 0
        self.cancel_count = 0
        self.closed = False
        self._go = asyncio.Event()
        self._played = 0

    def release(self) -> None:
        """Let a script that holds go on, up to the next hold."""
        self._go.set()

    def choose(self, model: str, folder: Path, adapter: str | None = None) -> None:
        self.chosen.append((model, folder, adapter))

    async def load(self) -> AsyncIterator[Event]:
        script = self.loads[min(self.load_count, len(self.loads) - 1)]
        self.load_count += 1
        self.loaded = False
        async for event in self._play(script):
            self.loaded = self.loaded or isinstance(event, Loaded)
            yield event

    async def count_tokens(self, text: str) -> int | None:
        """A token for each four characters."""
        return -(-len(text) // 4) if self.loaded else None

    async def ask(
        self,
        messages: list[Message],
        *,
        settings: Settings,
        tools: Sequence[dict[str, Any]] = (),
        continue_last: bool = False,
    ) -> AsyncIterator[Event]:
        scripts = [self._next_script() for _ in range(settings.samples)]
        self.asked.append(messages)
        self.settings.append(settings)
        self.tools.append(list(tools))
        self.continued.append(continue_last)
        async for event in self._play(scripts[0]) if len(scripts) == 1 else self._together(scripts):
            yield event

    def _next_script(self) -> list[Step]:
        self._played += 1
        return self.answers[min(self._played, len(self.answers)) - 1]

    async def _together(self, scripts: list[list[Step]]) -> AsyncIterator[Event]:
        """Play several scripts as samples; one that fails ends all of them, and the last Done is that of all."""
        heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        cancels = self.cancel_count

        async def play(number: int, script: list[Step]) -> None:
            async for event in self._play(script, cancels):
                heard.put_nowait((number, event))

        tasks = [asyncio.create_task(play(*each)) for each in enumerate(scripts)]
        done = 0
        try:
            while done < len(scripts):
                number, event = await heard.get()
                if isinstance(event, Failed):
                    yield event
                    return
                yield OfSample("", number, event)  # type: ignore[arg-type]
                if isinstance(event, Done):
                    done += 1
                    yield Sampled("", done, len(scripts))
            yield event
        finally:
            for task in tasks:
                task.cancel()

    async def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        self.adapters.append(folder)
        yield Failed("", "FormatError", f"{folder} is broken.") if folder == "broken" else AdapterUsed("", "smollm2")

    def cancel(self) -> None:
        self.cancel_count += 1
        self._go.set()

    async def close(self) -> None:
        self.closed = True

    async def _play(self, script: list[Step], cancels: int | None = None) -> AsyncIterator[Event]:
        cancels = self.cancel_count if cancels is None else cancels
        for step in script:
            if isinstance(step, str) and self.cancel_count == cancels:
                await self._go.wait()
                self._go.clear()
            elif isinstance(step, Exception):
                raise step
            if self.cancel_count > cancels:
                self._go.clear()
                end = script[-1]
                yield end if isinstance(end, Done) and end.finish_reason == "cancelled" else Done("", "cancelled")
                return
            if not isinstance(step, str | Exception):
                yield step
                await asyncio.sleep(self.pace_s)
