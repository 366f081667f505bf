"""The chat's parts that need no screen: cleaning, Markdown, figures, the conversation, the session."""

from __future__ import annotations

import asyncio

import pytest
from fake_backend import FIGURES, GONE, HOLD, FakeBackend

from edger1.errors import ContextError
from edger1.messages import Done, Event, Failed, Loaded, Progress, Text, Thought
from edger1.tui.clean import clean
from edger1.tui.conversation import Conversation
from edger1.tui.figures import duration, figures, memory
from edger1.tui.markdown import PARTS_MAX, parser
from edger1.tui.session import Session, State


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
    (fence, *rest) = parser().parse(large + "\nafter")
    assert fence.type == "fence"
    assert fence.content.count("|1|2|") == rows
    assert [token.content for token in rest if token.type == "inline"] == ["after"]


def test_nesting_is_bounded() -> None:
    assert max(token.level for token in parser().parse("> " * 3000 + "deep")) < 50


def test_figures_in_words_leave_out_what_was_not_measured() -> None:
    assert figures(FIGURES) == [
        "48.3 tok/s",
        "context 448 / 8,192",
        "first token 0.21 s",
        "prompt 12 new, 340 cached",
        "412 MB",
    ]
    assert figures(Done("", "stop")) == []
    assert memory(5_340_000_000) == "5.3 GB"
    assert [duration(seconds) for seconds in (0.04, 9.94, 37.2, 125)] == ["0.0 s", "9.9 s", "37 s", "2 min 5 s"]


def test_a_conversation_holds_whole_turns_only() -> None:
    conversation = Conversation("Be brief.")
    conversation.begin("one")
    assert conversation.messages()[-1] == {"role": "user", "content": "one"}
    conversation.hear("1")
    conversation.hear("!")
    assert conversation.end()
    conversation.begin("two")
    conversation.hear("\n")
    assert not conversation.end()
    assert conversation.messages() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1!"},
    ]


async def _all(events: object) -> list[Event]:
    return [event async for event in events]  # type: ignore[attr-defined]


def test_the_session_sends_the_answer_without_thoughts() -> None:
    backend = FakeBackend([Thought("", "hm"), Text("", "yes"), FIGURES])
    session = Session(backend)

    async def talk() -> None:
        await _all(session.load())
        await _all(session.ask("a?"))
        await _all(session.ask("b?"))

    asyncio.run(talk())
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
    events = asyncio.run(_all(session.ask("?")))
    assert sum(isinstance(event, Failed) for event in events) == 1
    assert isinstance(events[-1], Failed)
    assert said in events[-1].message
    assert session.state is state
    assert session.kept


def test_what_comes_after_a_stop_is_not_kept() -> None:
    backend = FakeBackend([Text("", "kept"), Text("", "late"), HOLD])
    session = Session(backend)

    async def talk() -> list[Event]:
        events = []
        async for event in session.ask("?"):
            events.append(event)
            session.stop()
        return events

    assert asyncio.run(talk()) == [Text("", "kept"), Done("", "cancelled")]
    assert backend.cancel_count == 1
    assert session.conversation.messages()[-1]["content"] == "kept"
    assert session.state is State.READY


def test_a_load_that_fails_leaves_the_engine_asleep() -> None:
    session = Session(FakeBackend(loads=[[Failed("", "FormatError", "Damaged.")], [Loaded("", "m")]]))
    assert asyncio.run(_all(session.load())) == [Failed("", "FormatError", "Damaged.")]
    assert session.state is State.ASLEEP
    asyncio.run(_all(session.load()))
    assert session.state is State.READY
