"""Runs the chat in lines over a scripted engine: `python plain_chat_script.py`, for tests in a real terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fake_backend import FIGURES, HOLD, FakeBackend, words

from edger1.cli.plain_chat import Lines, PlainChat
from edger1.messages import Event, Message, Thought
from edger1.tui.settings import Settings
from edger1.tui.terminal import colourless


class Scripted(FakeBackend):
    """The scripted engine, which notes the settings of each question."""

    def __init__(self, *answers: Any, **more: Any) -> None:
        super().__init__(*answers, **more)
        self.under: list[Settings] = []

    async def ask(
        self,
        messages: list[Message],
        *,
        settings: Settings | None = None,
        tools: Sequence[dict[str, Any]] = (),
        continue_last: bool = False,
    ) -> AsyncIterator[Event]:
        self.under.append(settings or Settings())
        async for event in super().ask(messages, settings=settings or Settings()):
            yield event


def main() -> None:
    backend = Scripted(
        [*words("It is even.", Thought), *words("Four. \x1b[31mNot red."), FIGURES],
        [*words("A long story"), HOLD, *words("never told"), FIGURES],
        [*words("After it."), FIGURES],
    )
    if "--stuck" in sys.argv:
        # An engine that does not come to a stop.
        backend.cancel = lambda: None  # type: ignore[method-assign]
    PlainChat(backend, "scripted", Lines(sys.stdin, sys.stdout, colour=not colourless(os.environ))).run()


if __name__ == "__main__":
    main()
