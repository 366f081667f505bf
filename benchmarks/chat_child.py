"""The whole chat with a scripted engine, or with a real one whose figures are kept, for `benchmarks.chat`.

python -m benchmarks.chat_child STORE script TOLD.json thinking|code|long SECONDS   # the chat; 50 tokens a second
python -m benchmarks.chat_child STORE engine TOLD.json FOLDER TOKENS                # the chat over a real engine
python -m benchmarks.chat_child STORE bare TOLD.json FOLDER TOKENS                  # that engine, without the chat
python -m benchmarks.chat_child STORE fill MESSAGES                                 # only write a conversation
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from edger1.cli.backend import ChildBackend
from edger1.cli.chat_window import collect
from edger1.messages import Done, Event, Figures, Loaded, Message, Running, Sampling, Text, Thought
from edger1.tui import run_chat
from edger1.tui.belongings import Belongings
from edger1.tui.settings import Settings
from edger1.tui.store import Store, Stored
from edger1.tui.title import TITLE_TOKENS
from edger1.tui.tree import Node, Tree, new_id

TOKENS_PER_S = 50
RUNNING_EVERY = 25
BEGUN = "Begun: "
"""What a scripted answer begins with."""
LAST = "zyxwvut"
"""The last word of a long conversation."""
QUESTION = "Tell me in as many words as you can how a bicycle is built, part by part."
PROSE = "the model reads every token of a prompt once and keeps what attention needs of it"
WORDS = PROSE.split()


def paragraph(dice: random.Random, count: int) -> str:
    """Return a sentence of `count` words."""
    return " ".join(dice.choice(WORDS) for _ in range(count)).capitalize() + "."


def markdown(dice: random.Random, parts: int) -> str:
    """Return an answer as models write them: headings, lists, code, a table."""
    made = []
    for at in range(parts):
        code = "\n".join(f"def f{line}(x): return x * {line}  # {paragraph(dice, 4)}" for line in range(12))
        rows = "\n".join(f"| {row} | {paragraph(dice, 3)} |" for row in range(4))
        items = "\n".join(f"- {paragraph(dice, 12)}" for _ in range(5))
        made.append(
            [
                f"## Part {at}\n\n{paragraph(dice, 60)} With **bold** and `code`.",
                f"```python\n{code}\n```",
                items,
                f"| a | b |\n|---|---|\n{rows}",
            ][at % 4]
        )
    return "\n\n".join(made) + "\n\n"


def conversation(messages: int) -> Tree:
    """Return a conversation of long answers, a third of them with a thought."""
    dice, tree = random.Random(1), Tree()
    for at in range(messages):
        if at % 2 == 0:
            tree.add(Node("user", paragraph(dice, dice.randint(5, 60)), parent=tree.head))
        else:
            thought = paragraph(dice, 300) if at % 3 == 0 else ""
            text = markdown(dice, dice.randint(2, 6)) + (LAST if at == messages - 1 else "")
            tree.add(Node("assistant", text, parent=tree.head, thought=thought, thought_s=4.0, finish="stop"))
    return tree


class Script:
    """An engine that says a long answer at 50 tokens a second and keeps what of the processor that took."""

    def __init__(self, told: Path, script: str, seconds: float) -> None:
        self._told, self._script, self._count = told, script, round(seconds * TOKENS_PER_S)

    def choose(self, model: str, folder: Path, adapter: str | None = None) -> None:
        """There is nothing to choose."""

    async def load(self) -> AsyncIterator[Event]:
        """It is there at once."""
        yield Loaded("", "scripted")

    async def use_adapter(self, folder: str | None) -> AsyncIterator[Event]:
        """There are none."""
        return
        yield

    async def count_tokens(self, text: str) -> int | None:
        """A token for each four characters."""
        return len(text) // 4

    def cancel(self) -> None:
        """It is not stopped."""

    async def close(self) -> None:
        """There is nothing to close."""

    async def ask(
        self,
        messages: list[Message],
        *,
        settings: Settings,
        tools: Sequence[dict[str, Any]] = (),
        continue_last: bool = False,
    ) -> AsyncIterator[Event]:
        """Say the script, or the title of what it said."""
        if settings.max_tokens == TITLE_TOKENS:
            yield Text("", "A long answer")
            yield Done("", "stop")
            return
        dice, kind = random.Random(2), Thought if self._script == "thinking" else Text
        if self._script == "long":
            yield Text("", markdown(dice, 40)[:16_000] + "\n\n")
        await asyncio.sleep(2.0)
        yield kind("", BEGUN)
        text = markdown(dice, 80)
        if kind is Thought:
            text = "\n".join(paragraph(dice, 40) for _ in range(300))
        processor, began = time.process_time(), time.perf_counter()
        for at in range(self._count):
            yield kind("", text[4 * at : 4 * at + 4])
            if at % RUNNING_EVERY == 0:
                yield Running("", Figures(decode_tokens_per_s=50.0 + at % 7, context_used=at, context_size=8192))
            await asyncio.sleep(max(0.0, began + (at + 1) / TOKENS_PER_S - time.perf_counter()))
        share = (time.process_time() - processor) / (time.perf_counter() - began)
        tell(self._told, {"share": share})
        yield Done("", "stop")


class Kept(ChildBackend):
    """The real engine; how fast it answered is kept."""

    def __init__(self, told: Path, folder: Path) -> None:
        super().__init__(folder, memory=None, context=None, precision="fast")
        self._told = told

    async def ask(self, messages: list[Message], *, settings: Settings, **given: Any) -> AsyncIterator[Event]:
        """Answer, and keep the figures of what was no title."""
        async for event in super().ask(messages, settings=settings, **given):
            # Before it is passed on: whoever has the last event asks for no more.
            if isinstance(event, Done) and settings.max_tokens != TITLE_TOKENS:
                rate, tokens = event.figures.decode_tokens_per_s, event.usage.completion_tokens
                tell(self._told, {"rate": rate or 0.0, "tokens": float(tokens)})
            yield event


def tell(path: Path, found: dict[str, float]) -> None:
    """Write what was found, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(path)


def greedy(tokens: int) -> Settings:
    """Return settings under which the same model always says the same."""
    return Settings(sampling=Sampling(temperature=0.0), max_tokens=tokens)


async def bare(backend: Kept, tokens: int) -> None:
    """Ask the engine as the chat does, and show nothing."""
    async for _ in backend.load():
        pass
    async for _ in backend.ask([{"role": "user", "content": QUESTION}], settings=greedy(tokens)):
        pass
    await backend.close()


def main() -> None:
    """Do what the command line says."""
    place, what, *rest = sys.argv[1:]
    if what == "bare":
        asyncio.run(bare(Kept(Path(rest[0]), Path(rest[1])), int(rest[2])))
        return
    store = Store.open(Path(place))
    if what == "fill":
        store.insert(Stored(new_id(), "Long talk", conversation(int(rest[0])), created_at=1e9, updated_at=1e9))
        store.close()
        return
    told = Path(rest[0])
    real = what == "engine"
    backend = Kept(told, Path(rest[1])) if real else Script(told, rest[1], float(rest[2]))
    settings = greedy(int(rest[2])) if real else None
    run_chat(backend, "measured", settings=settings, belongings=Belongings(store=store), on_painted=collect)


if __name__ == "__main__":
    main()
