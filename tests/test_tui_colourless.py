"""Without colours: nothing but the terminal's own two, and what is chosen is still seen."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest
from chatting import screen
from fake_backend import FIGURES
from rich.segment import Segment
from textual.app import App, ComposeResult
from textual.widgets import Footer, Input, OptionList, TextArea

from edger1.tui.keymap import Keymap
from edger1.tui.screens.help import HelpScreen
from edger1.tui.themes import COLOURLESS, COLOURLESS_CSS
from edger1.tui.tree import Node
from edger1.tui.widgets.notice import Notice
from edger1.tui.widgets.question import Question
from edger1.tui.widgets.status import Status


class Host(App[None]):
    CSS = COLOURLESS_CSS + "OptionList { height: 4; } TextArea { height: 4; }"

    def __init__(self) -> None:
        super().__init__(ansi_color=True)
        self.register_theme(COLOURLESS)
        self.theme = COLOURLESS.name

    def compose(self) -> ComposeResult:
        yield Question(Node("user", "A question"))
        yield Notice.error("It failed", "Do this.")
        yield OptionList("one", "two", "three")
        yield TextArea("some selected words")
        yield Input("words")
        yield Status()
        yield Footer()


def segments(app: App[Any]) -> list[Segment]:
    return [part for line in app.screen._compositor.render_strips() for part in line]


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
def test_no_colour_is_used_and_what_is_chosen_is_seen(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    async def run() -> None:
        app = Host()
        async with app.run_test(size=size) as pilot:
            app.query_one(Status).show(dataclasses.replace(FIGURES.figures, context_used=8000))
            app.query_one(OptionList).focus()
            await pilot.pause()
            await pilot.press("down")
            await pilot.pause()
            shown = segments(app)
            coloured = [
                part
                for part in shown
                if part.style
                and (
                    (part.style.color and not part.style.color.is_default)
                    or (part.style.bgcolor and not part.style.bgcolor.is_default)
                )
            ]
            assert coloured == []
            underlined = "".join(part.text for part in shown if part.style and part.style.underline)
            assert underlined.strip() == "two"
            assert "nearly full" in [
                word for part in shown if part.style and part.style.bold for word in [part.text[-11:]]
            ]
            text = app.query_one(TextArea)
            text.focus()
            text.select_all()
            await pilot.pause()
            assert "some selected words" in "".join(
                part.text for part in segments(app) if part.style and part.style.reverse
            )
            await app.push_screen(HelpScreen(Keymap()))
            await pilot.pause()
            assert "Send the message" in screen(app)

    asyncio.run(asyncio.wait_for(run(), timeout=90))
