"""The chat as a user meets it: keys go in, the screen is read."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from chatting import drive, screen, settle, until
from children import LIMIT_S
from fake_backend import FIGURES, HOLD, FakeBackend, words
from textual.pilot import Pilot

from edger1.errors import UsageError
from edger1.messages import Failed, Progress, Text, Thought
from edger1.tui import app as app_module
from edger1.tui.app import ChatApp
from edger1.tui.session import State
from edger1.tui.widgets.answer_text import AnswerText
from edger1.tui.widgets.plain_text import PlainText
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.thinking import Thinking
from edger1.tui.widgets.transcript import Transcript


def test_a_question_is_sent_and_answered() -> None:
    backend = FakeBackend([*words("It is **four**, by `2 + 2`."), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press(*"2 + 2?", "enter")
        await settle(pilot, app)
        shown = screen(app)
        assert "▌ 2 + 2?" in shown
        assert "It is four, by 2 + 2." in shown
        assert " 48.3 tok/s · context   448 / 8,192 · first 0.21 s · 0.4/4.0 GB" in shown
        assert app.query_one(Prompt).text == ""

    drive(backend, scenario, system="Be brief.")
    assert backend.asked == [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]]


def test_the_adapter_is_changed_by_a_line_that_the_model_never_sees() -> None:
    backend = FakeBackend()

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await settle(pilot, app)
        app.query_one(Prompt).text = "/adapter runs/a b"
        await pilot.press("enter")
        await settle(pilot, app)
        assert "Adapter runs/a b." in screen(app)
        assert app.query_one(Prompt).text == ""
        app.query_one(Prompt).text = "/adapter broken"
        await pilot.press("enter")
        await settle(pilot, app)
        assert "broken is broken." in screen(app)
        app.query_one(Prompt).text = "/adapter off"
        await pilot.press("enter")
        await settle(pilot, app)
        assert "without an adapter" in screen(app)
        await pilot.press(*"Hi", "enter")
        await settle(pilot, app)

    drive(backend, scenario)
    assert backend.adapters == ["runs/a b", "broken", None]
    assert [turn["content"] for turn in backend.asked[0]] == ["Hi"]


def test_each_question_carries_the_whole_conversation() -> None:
    backend = FakeBackend([Thought("", "hm"), Text("", "one"), FIGURES], [Text("", "two"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await settle(pilot, app)
        await pilot.press("b", "enter")
        await settle(pilot, app)

    drive(backend, scenario)
    assert [message["content"] for message in backend.asked[1]] == ["a", "one", "b"]


@pytest.mark.parametrize("key", ["ctrl+j", "shift+enter"])
def test_a_message_can_have_several_lines(key: str) -> None:
    backend = FakeBackend()

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        # All at once, as a fast typist's keys arrive.
        for name in ("a", key, "b", "enter"):
            app.simulate_key(name)
        await until(pilot, lambda: bool(backend.asked))
        await settle(pilot, app)

    drive(backend, scenario)
    assert backend.asked[0][-1]["content"] == "a\nb"


def test_an_empty_message_is_not_sent() -> None:
    backend = FakeBackend()

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("enter", "space", "enter")
        await settle(pilot, app)

    drive(backend, scenario)
    assert backend.asked == []


def test_text_shows_while_it_streams() -> None:
    backend = FakeBackend([*words("first half"), HOLD, *words(" second half"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "first half" in screen(app))
        assert "Writing" in screen(app)
        assert "tok/s" not in screen(app)
        backend.release()
        await settle(pilot, app)
        assert "first half second half" in screen(app)

    drive(backend, scenario)


def test_prefill_tells_how_far_it_is() -> None:
    backend = FakeBackend([Progress("", "prefill", 512, 2048), HOLD, Text("", "x"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "Reading · 512 of 2,048 tokens" in screen(app))
        above = screen(app).split("▌ a")[1].split("╭")[0]
        assert above.strip() == ""
        backend.release()
        await settle(pilot, app)

    drive(backend, scenario)


def test_escape_stops_at_once_and_keeps_what_was_said() -> None:
    backend = FakeBackend([*words("said before"), HOLD, *words("never"), FIGURES], [Text("", "next"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "said before" in screen(app))
        await pilot.press("escape")
        assert "Stopped." in screen(app)
        await settle(pilot, app)
        assert "never" not in screen(app)
        await pilot.press("b", "enter")
        await settle(pilot, app)
        assert "next" in screen(app)

    drive(backend, scenario)
    assert backend.cancel_count == 1
    assert [message["content"] for message in backend.asked[1]] == ["a", "said before", "b"]


def test_a_question_stopped_before_any_word_comes_back_to_be_edited() -> None:
    backend = FakeBackend([Thought("", "hm"), HOLD, FIGURES], [Text("", "x"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "Thinking" in screen(app))
        await pilot.press("escape")
        await settle(pilot, app)
        assert app.query_one(Prompt).text == "a"
        await pilot.press("b", "enter")
        await settle(pilot, app)

    drive(backend, scenario)
    assert [message["content"] for message in backend.asked[1]] == ["ab"]


def test_sending_during_an_answer_loses_nothing() -> None:
    backend = FakeBackend([Text("", "x"), HOLD, FIGURES], [Text("", "y"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: app.session.state is State.ANSWERING)
        await pilot.press("b", "enter")
        assert app.query_one(Prompt).text == "b"
        backend.release()
        await settle(pilot, app)
        await pilot.press("enter")
        await settle(pilot, app)

    drive(backend, scenario)
    assert [messages[-1]["content"] for messages in backend.asked] == ["a", "b"]


def test_a_new_conversation_forgets_the_old_one_even_in_mid_answer() -> None:
    backend = FakeBackend([*words("old words"), HOLD, FIGURES], [Text("", "new words"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "old words" in screen(app))
        await pilot.press("ctrl+n")
        assert "old words" not in screen(app)
        assert "Ready. Ask anything." in screen(app)
        await pilot.press("b", "enter")
        await settle(pilot, app)
        assert "new words" in screen(app)

    drive(backend, scenario)
    assert backend.asked[1] == [{"role": "user", "content": "b"}]


def test_reasoning_is_open_while_it_comes_and_folds_for_the_answer() -> None:
    backend = FakeBackend([*words("two and two", Thought), HOLD, Text("", "Four."), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "two and two" in screen(app))
        assert "▾ Thinking · 3 words" in screen(app)
        backend.release()
        await settle(pilot, app)
        assert "two and two" not in screen(app)
        assert "▸ Thought for " in screen(app)
        await pilot.press("ctrl+t")
        await pilot.pause()
        assert "two and two" in screen(app)
        await pilot.click("ThinkingTitle")
        assert app.query_one(Thinking).folded

    drive(backend, scenario)


def test_reasoning_that_the_user_folds_stays_as_the_user_wants() -> None:
    backend = FakeBackend([Thought("", "hm"), HOLD, Text("", "Four."), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: "hm" in screen(app))
        await pilot.press("ctrl+t", "ctrl+t")
        backend.release()
        await settle(pilot, app)
        assert not app.query_one(Thinking).folded

    drive(backend, scenario)


def test_long_reasoning_keeps_every_line() -> None:
    lines = [f"step {number} follows from the one before" for number in range(300)]
    first, second = "\n".join(lines[:150]), "\n" + "\n".join(lines[150:])
    backend = FakeBackend([*words(first, Thought), HOLD, *words(second, Thought), Text("", "x"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: lines[149] in screen(app))
        backend.release()
        await settle(pilot, app)
        await pilot.press("ctrl+t")
        await pilot.pause()
        assert app.query_one("Thinking > PlainText", PlainText).text.split("\n") == lines

    drive(backend, scenario)


HOSTILE = [
    "\x1b[2J\x1b]0;owned\x07\x9b31mred",
    "[bold]not bold[/bold] [link=https://x.example]y[/link] [@click=app.quit]z[/]",
    "> " * 500 + "deep",
    "\n".join("  " * depth + "- x" for depth in range(200)),
    "|" + "a|" * 40 + "\n|" + "-|" * 40 + "\n" + ("|" + "b|" * 40 + "\n") * 50,
    "x" * 50_000,
    "```[bold]\n" + "y" * 50_000 + "\n```",
    "[" * 2_000 + "`" * 999 + "*" * 999,
    "[a](javascript:x') ![i](\x1b[31m) <script>alert(1)</script>",
    "e" + "\u0301" * 2_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_only_text(text: str) -> None:
    pieces = [text[at : at + 500] for at in range(0, len(text), 500)]
    backend = FakeBackend([Thought("", text[:2_000]), *(Text("", piece) for piece in pieces), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await settle(pilot, app)
        shown = screen(app)
        assert not set(shown) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160)]))
        assert len(shown.split("\n")) == 24
        assert app.query_one(AnswerText).source == text.translate(dict.fromkeys([7, 27, 0x9B]))
        assert len(app.query("*")) < 2_000
        await pilot.press(*"still here")
        assert app.query_one(Prompt).text == "still here"

    drive(backend, scenario)


def test_markup_in_text_is_shown_as_written() -> None:
    said = "[bold]b[/bold] and [link=x]l[/link]"
    backend = FakeBackend([Thought("", said), HOLD, Text("", said), Failed("", "ContextError", said)])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        app.query_one(Prompt).insert(said)
        await pilot.press("enter")
        await until(pilot, lambda: screen(app).count(said) == 2)
        backend.release()
        await settle(pilot, app)
        assert screen(app).count(said) == 3

    drive(backend, scenario)


def test_a_link_is_told_and_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(ChatApp, "open_url", lambda self, url, **_: opened.append(url))
    backend = FakeBackend([Text("", "[here](https://example.org/x)"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await settle(pilot, app)
        await pilot.click(AnswerText, offset=(1, 0))
        await pilot.pause()
        assert app.clipboard == "https://example.org/x"

    drive(backend, scenario)
    assert opened == []


def test_a_tiny_terminal_shows_it_all() -> None:
    backend = FakeBackend([*words("word " * 200 + "end."), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press(*"a", "ctrl+j", *"b", "enter")
        await settle(pilot, app)
        shown = screen(app)
        assert "end." in shown
        assert "Ask anything" in shown
        assert "48.3 tok/s" in shown
        assert "Send" in shown
        await pilot.press("f1")
        await pilot.press(*"new conv")
        assert "Ctrl+N" in screen(app)
        await pilot.press("escape")
        await pilot.resize_terminal(20, 6)
        await pilot.press("c")
        assert app.query_one(Prompt).text == "c"

    drive(backend, scenario, size=(60, 15))


def test_scrolling_up_stays_there_while_text_comes() -> None:
    backend = FakeBackend([*words("line\n\n" * 60), HOLD, *words("more\n\n" * 20), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        transcript = app.query_one(Transcript)
        await until(pilot, lambda: transcript.max_scroll_y > 60 and transcript.scroll_y == transcript.max_scroll_y)
        await pilot.press("pageup")
        await pilot.pause()
        at = transcript.scroll_y
        assert at < transcript.max_scroll_y
        backend.release()
        await settle(pilot, app)
        assert transcript.scroll_y == at

    drive(backend, scenario)


def test_control_c_copies_a_selection_and_quits_without_one() -> None:
    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press(*"abc", "shift+left", "ctrl+c")
        assert app.clipboard == "c"
        assert app.is_running
        await pilot.press("right", "ctrl+c")
        await pilot.pause()
        assert app._exit

    drive(FakeBackend(), scenario)


@pytest.mark.parametrize("key", ["ctrl+q", "ctrl+c"])
def test_quitting_in_mid_answer(key: str) -> None:
    backend = FakeBackend([Text("", "x"), HOLD, FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await until(pilot, lambda: app.session.state is State.ANSWERING)
        await pilot.press(key)
        await pilot.pause()
        assert app._exit

    drive(backend, scenario)


def test_nothing_runs_while_idle() -> None:
    backend = FakeBackend([Thought("", "hm"), Text("", "x"), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await pilot.press("a", "enter")
        await settle(pilot, app)
        before = asyncio.get_running_loop().time()
        timers = [
            timer
            for node in [app, app.screen, *app.query("*")]
            for timer in node._timers
            if timer._active.is_set() and timer._repeat is None
        ]
        assert timers == []
        assert asyncio.get_running_loop().time() - before < 5

    drive(backend, scenario)


def test_an_unknown_theme_is_refused_with_names() -> None:
    with pytest.raises(UsageError, match="edger1-dark"):
        ChatApp(FakeBackend(), "m", theme="mauve")


def test_importing_the_package_does_not_import_textual() -> None:
    code = "import sys, edger1.tui; sys.exit('textual' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=LIMIT_S).returncode == 0


def test_it_ends_when_the_terminal_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is closed must leave no process behind that reads its end for ever, and no model in memory."""
    there = iter([True, True, False])
    ended: list[bool] = []
    monkeypatch.setattr(app_module, "_LOOK_S", 0.0)
    monkeypatch.setattr(app_module.os, "isatty", lambda _: next(there))
    app: Any = SimpleNamespace(exit=lambda: ended.append(True), keep_draft=lambda: None)
    asyncio.run(app_module._end_with_terminal(app))
    assert ended == [True]
