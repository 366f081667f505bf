"""The texts of a conversation: wrapped plain text, code blocks, hostile Markdown and floods of it."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from textual.pilot import Pilot
from textual.widgets import TextArea
from transcripts import Host, drive, quiet, screen, shown_words

from edger1.tui.clean import STACK_MAX, clean, tame
from edger1.tui.markdown import Code, code_blocks, parser
from edger1.tui.tree import Node, Tree
from edger1.tui.widgets import answer_text
from edger1.tui.widgets.answer import Answer
from edger1.tui.widgets.plain_text import PlainText
from edger1.tui.widgets.question import Question

# Plain text

PIECES = st.lists(st.text(st.sampled_from("ab \t\n語é\u0301👩\u200d"), max_size=30), max_size=8)


@given(PIECES, st.integers(2, 20))
def test_text_wrapped_in_pieces_is_the_text(pieces: list[str], width: int) -> None:
    whole, grown = PlainText(tame("".join(pieces))), PlainText()
    for piece in pieces:
        grown._take(piece)
        grown._wrap(width)
    whole._wrap(width)
    for shown in (whole, grown):
        assert {number for number, _, _ in shown._rows} == set(range(len(shown._lines)))
        for number, begin, end in shown._rows:
            assert end - begin <= width
            assert begin == 0 or shown._lines[number][:begin].strip() is not None
        kept = "".join(shown._lines[number][begin:end] for number, begin, end in shown._rows)
        assert kept.replace(" ", "") == shown.text.replace(" ", "").replace("\n", "")


def test_stacks_of_marks_are_cut_for_the_screen_only() -> None:
    assert tame("e" + "\u0301" * 500 + "x" + "\u200b" * 500) == "e" + "\u0301" * STACK_MAX + "x" + "\u200b" * STACK_MAX
    family = "👩‍👩‍👧 é नमस्ते שָׁלוֹם"
    assert tame(family) == family


def test_code_blocks_are_found_as_they_were_written() -> None:
    text = "a\n```py title\nx = '*'\n\n```\n> ~~~\n> [b](c)\n> ~~~\n\n    indented\n"
    assert code_blocks(text) == [Code("py", "x = '*'\n"[:-1]), Code("", "[b](c)"), Code("", "indented")]


# Hostile Markdown

LETTERS = st.text(st.sampled_from("ab7"), min_size=1, max_size=6)
MARKS = st.sampled_from(
    ["\n", "\n\n", "> ", "- ", "1. ", "#", "*", "**", "_", "`", "```\n", "~~", "[", "](", ")", "![", "|", "|-|-|\n",
     "<b>", "&lt;", "\\", "\\(", "\\)", "$$", "    ", "---\n", "===\n", "\x1b[31m", "\u202e", "\u0301" * 20,
     "[a]: b\n", "\r\n", "\t"]
)  # fmt: skip
DOCUMENT = st.lists(st.one_of(LETTERS, MARKS), max_size=60).map("".join)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(DOCUMENT, min_size=1, max_size=4))
def test_no_word_of_hostile_markdown_is_lost_and_nothing_breaks(documents: list[str]) -> None:
    async def scenario(pilot: Pilot[None], app: Host) -> None:
        for text in documents:
            streamed, opened = Answer(Node("assistant")), Answer(Node("assistant", text, finish="stop"))
            await app.transcript.say(streamed, opened)
            for at in range(0, len(text), 7):
                await streamed.feed(text[at : at + 7])
                await asyncio.sleep(0)
            await streamed.finish("")
            await pilot.pause()
            assert streamed.text == clean(text).lstrip()
            for answer in (streamed, opened):
                shown = shown_words(answer)
                assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
                # Letters stand for what was said; digits may be the number of a list. Addresses are told on a click.
                said = re.sub(r"\]\([^)\n]*\)", "", clean(text))
                for letter in "ab":
                    assert shown.count(letter) >= min(1, said.count(letter) - text.count("```") * 6)

    drive(scenario)


MEGABYTE = 1_000_000
FLOODS = {
    "a line": "x" * MEGABYTE,
    "words": "word " * (MEGABYTE // 5),
    "wide": "語" * (MEGABYTE // 3),
    "quotes": "> " * 10_000 + "deep",
    "lists": "- " * 10_000 + "deep",
    "a list in a list": "\n".join("  " * depth + "- x" for depth in range(300)),
    "emphasis": "*a **a " * 20_000,
    "brackets": "[" * 50_000,
    "links": "[a](" * 20_000,
    "ticks": "`a``b" * 20_000,
    "references": "".join(f"[r{number}]: http://x.example/{number}\n" for number in range(5_000)),
    "a table": "|" + "a|" * 300 + "\n|" + "-|" * 300 + "\n" + ("|" + "b|" * 300 + "\n") * 50,
    "headings": "# a\n" * 5_000,
    "fences": "```\na\n```\n" * 1_000,
    "combining": ("e" + "\u0301" * 2_000) * 100,
    "invisible": "a\u200b" * 200_000,
    "escapes": "\x1b[2J\x1b]0;x\x07" * 20_000,
    "code": "```js\n" + "a=1;" * (MEGABYTE // 4) + "\n```",
}


@pytest.mark.parametrize("text", FLOODS.values(), ids=FLOODS)
def test_a_flood_never_holds_the_screen_up(text: str) -> None:
    """The bound here is generous, for machines with other work; benchmarks.chat measures the real one."""
    tree = Tree()
    asked = tree.add(Node("user", text))
    tree.add(Node("assistant", text, parent=asked.id, finish="stop", thought=text))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        longest = 0.0

        async def watch() -> None:
            nonlocal longest
            while True:
                began = time.thread_time()
                await asyncio.sleep(0.002)
                longest = max(longest, time.thread_time() - began)

        watching = asyncio.create_task(watch())
        await app.transcript.open(tree)
        await quiet(pilot, app)
        watching.cancel()
        # Processor time of this thread between two turns of the loop: what others take does not count.
        assert longest < 2.0
        assert len(app.query("*")) < 1_500
        await pilot.press("x")
        assert app.query_one("#prompt", TextArea).text == "x"

    drive(scenario)


def test_parsing_is_bounded() -> None:
    for text in FLOODS.values():
        began = time.thread_time()
        parser().parse(clean(text))
        assert time.thread_time() - began < 2.0


def test_a_question_shows_what_was_typed() -> None:
    typed = "[bold]x[/bold] *y*\n\n  <z> \x1b[31m"

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.say(Question(Node("user", typed)))
        await pilot.pause()
        assert app.query_one("Question PlainText", PlainText).text == clean(typed)
        assert "[bold]x[/bold] *y*" in screen(app)

    drive(scenario)


def test_an_answer_ends_though_its_code_cannot_be_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **named: object) -> None:
        raise RuntimeError("a fault in a lexer")

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        answer = Answer(Node("assistant"))
        await app.transcript.say(answer)
        await answer.feed("Look:\n\n```python\nprint(")
        await quiet(pilot, app)
        monkeypatch.setattr(answer_text, "highlight", fails)
        await answer.feed("1)\n")
        await asyncio.wait_for(answer.finish(), 20)
        await quiet(pilot, app)
        assert "print(1)" in screen(app)

    drive(scenario)
