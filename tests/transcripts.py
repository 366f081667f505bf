"""A transcript above a text box, driven by a pilot, and conversations to show in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from textual.app import App, ComposeResult
from textual.pilot import Pilot
from textual.selection import SELECT_ALL
from textual.widgets import TextArea

from edger1.tui.themes import DARK
from edger1.tui.tree import Node, Tree
from edger1.tui.widgets.answer import Answer
from edger1.tui.widgets.transcript import Transcript
from edger1.tui.widgets.turn import Turn


class Host(App[None]):
    """A transcript above a text box; keeps what the transcript posts."""

    CSS = "Screen { padding: 0 1; }"
    BINDINGS = [("ctrl+up", "read", "Read")]  # noqa: RUF012

    def __init__(self, transcript: Transcript | None = None) -> None:
        super().__init__()
        self.register_theme(DARK)
        self.theme = DARK.name
        self.transcript = transcript or Transcript()
        self.acts: list[tuple[str, str, str | None]] = []

    def compose(self) -> ComposeResult:
        yield self.transcript
        prompt = TextArea(id="prompt")
        prompt.cursor_blink = False
        yield prompt

    def on_mount(self) -> None:
        self.query_one("#prompt").styles.height = 3
        self.query_one("#prompt").focus()

    def action_read(self) -> None:
        self.transcript.take_keyboard()

    def on_transcript_act(self, event: Transcript.Act) -> None:
        self.acts.append((event.node_id, event.action, event.text))

    def on_transcript_left(self) -> None:
        self.query_one("#prompt").focus()


Scenario = Callable[[Pilot[None], Host], Awaitable[None]]


def drive(scenario: Scenario, size: tuple[int, int] = (80, 24), transcript: Transcript | None = None) -> None:
    async def run() -> None:
        app = Host(transcript)
        async with app.run_test(size=size) as pilot:
            await scenario(pilot, app)

    asyncio.run(asyncio.wait_for(run(), timeout=200))


def screen(app: App[None]) -> str:
    return "\n".join("".join(part.text for part in line).rstrip() for line in app.screen._compositor.render_strips())


async def quiet(pilot: Pilot[None], app: Host) -> None:
    """Wait until nothing more is mounted."""
    while app.transcript._keeping is not None and not app.transcript._keeping.done():
        await pilot.pause(0.01)
    await app.workers.wait_for_complete()
    await pilot.pause()


def talk(count: int, tree: Tree | None = None) -> Tree:
    tree = tree or Tree()
    for number in range(count):
        if number % 2:
            text = f"Answer {number}.\n\n" + "\n\n".join(f"Line {line} of {number}." for line in range(number % 9))
            tree.add(Node("assistant", text, parent=tree.head, finish="stop", thought="hm " * (number % 4)))
        else:
            tree.add(Node("user", f"Question {number}?", parent=tree.head))
    return tree


def mounted(app: Host) -> list[str]:
    return [turn.node.id for turn in app.query(Turn)]


def shown_words(widget: Answer) -> str:
    texts: list[str] = []
    for each in widget.query("*"):
        if each.allow_select and not each.children:
            found = each.get_selection(SELECT_ALL)
            texts.append(found[0] if found else "")
    return "".join(texts)
