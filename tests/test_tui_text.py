"""The chat's parts that need no screen: cleaning, Markdown, pacing, events to their end."""

from __future__ import annotations

import asyncio

import pytest
from fake_backend import FIGURES, GONE, FakeBackend

from edger1.errors import ContextError
from edger1.messages import Event, Failed, Loaded, Progress, Text, Thought
from edger1.tui.clean import clean
from edger1.tui.figures import duration, memory
from edger1.tui.markdown import PARTS_MAX, parser
from edger1.tui.session import Session, State
from edger1.tui.tree import Node


def test_cleaning_removes_what_a_terminal_acts_on() -> None:
    hostile = "\x1b[2Ja\x07b\x9b31mc\x00\r\n\td\x7f\u202ee\u2028f\ud800"
    assert clean(hostile) == "[2Jab31mc\n\tde\nf\ufffd"


def test_cleaning_in_pieces_equals_cleaning_at_once() -> None:
    hostile = "x\x1b]0;title\x07\r\ny\u2067z"
    assert "".join(clean(character) for character in hostile) == clean(hostile)


def test_cleaning_leaves_ordinary_text_of_any_script_alone() -> None:
    text = "naïve 日本語 עברית 👩‍👩‍👧 \n\tx"
    assert clean(text) == text


def _inline(text: str) -> list[tuple[str, str]]:
    return [(token.type, token.content) for token in parser().parse(text)[1].children or []]


def test_latex_is_kept_whole() -> None:
    assert _inline(r"so \(a_1 * b_2 * c\) **holds**")[:2] == [("text", r"so \(a_1 * b_2 * c\) "), ("strong_open", "")]
    assert _inline("\\[\nx_1\n\\]") == [
        ("text", "\\["),
        ("hardbreak", ""),
        ("text", "x_1"),
        ("hardbreak", ""),
        ("text", "\\]"),
    ]


def test_html_is_text() -> None:
    assert _inline("<think><b>x</b>") == [("text", "<think><b>x</b>")]


def test_a_table_too_large_to_lay_out_is_shown_as_written() -> None:
    rows = PARTS_MAX // 2
    small = "|a|b|\n|-|-|\n|1|2|\n"
    large = "|a|b|\n|-|-|\n" + "|1|2|\n" * rows
    assert any(token.type == "table_open" for token in parser().parse(small))
    (plain, *rest) = parser().parse(large + "\nafter")
    assert plain.type == "plain"
    assert plain.content.count("|1|2|") == rows
    assert [token.content for token in rest if token.type == "inline"] == ["after"]


def test_nesting_is_bounded() -> None:
    assert max(token.level for token in parser().parse("> " * 3000 + "deep")) < 50


def test_memory_and_time_are_written_as_people_read_them() -> None:
    assert [memory(size) for size in (64_800, 412_000_000, 5_340_000_000)] == ["65 kB", "412 MB", "5.3 GB"]
    assert [duration(seconds) for seconds in (0.04, 9.94, 37.2, 125)] == ["0.0 s", "9.9 s", "37 s", "2 min 5 s"]


async def _all(events: object) -> list[Event]:
    return [event async for event in events]  # type: ignore[attr-defined]


def test_the_session_sends_the_answer_without_thoughts() -> None:
    backend = FakeBackend([Thought("", "hm"), Text("", "yes"), FIGURES])
    session = Session(backend)

    async def talk() -> None:
        await _all(session.load())
        await _all(session.ask(Node("user", "a?")))
        await _all(session.ask(Node("user", "b?")))

    asyncio.run(asyncio.wait_for(talk(), timeout=90))
    assert backend.asked[1] == [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "b?"},
    ]


@pytest.mark.parametrize(
    ("step", "state", "said"),
    [
        (GONE, State.ASLEEP, "memory ran out"),
        (Failed("", "ContextError", "Too long."), State.READY, "Too long."),
        (ContextError("Too long."), State.READY, "Too long."),
        (RuntimeError("broken pipe"), State.ASLEEP, "broken pipe"),
        (Progress("", "prefill", 1, 2), State.ASLEEP, "in the middle"),
    ],
)
def test_every_way_to_fail_ends_in_one_failed_event(step: Event | Exception, state: State, said: str) -> None:
    session = Session(FakeBackend([Text("", "half"), step]))
    events = asyncio.run(asyncio.wait_for(_all(session.ask(Node("user", "?"))), timeout=90))
    assert sum(isinstance(event, Failed) for event in events) == 1
    assert said in next(event.message for event in events if isinstance(event, Failed))
    assert session.state is state
    assert session.tree.path()[-1].text == "half"
    assert session.tree.path()[-1].finish == "failed"


def test_a_load_that_fails_leaves_the_engine_asleep() -> None:
    session = Session(FakeBackend(loads=[[Failed("", "FormatError", "Damaged.")], [Loaded("", "m")]]))
    assert asyncio.run(asyncio.wait_for(_all(session.load()), timeout=90)) == [Failed("", "FormatError", "Damaged.")]
    assert session.state is State.ASLEEP
    asyncio.run(asyncio.wait_for(_all(session.load()), timeout=90))
    assert session.state is State.READY
