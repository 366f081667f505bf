"""An answer's Markdown as lines: what is drawn while it is written, and what a full render draws."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tui_transcript_text import DOCUMENT
from textual.content import Content

from edger1.tui.clean import clean
from edger1.tui.drawing import Drawing, share
from edger1.tui.markdown import parser, top_blocks
from edger1.tui.widgets.answer_text import AnswerText

Drawn = list[tuple[str, str, str, str]]


def _drawing(width: int) -> Drawing:
    return Drawing(width, lambda token, code: Content(code))


def _plain(drawing: Drawing) -> Drawn:
    return [(line.first.plain, line.rest.plain, line.mark, line.text.plain) for line in drawing.lines]


def _whole(text: str, width: int = 40) -> Drawn:
    drawing = _drawing(width)
    drawing.add(top_blocks(parser().parse(text)))
    return _plain(drawing)


@settings(max_examples=150, deadline=None)
@given(DOCUMENT, st.integers(1, 9))
def test_what_streaming_draws_is_what_a_full_render_draws(text: str, step: int) -> None:
    text = clean(text).lstrip()
    grown = AnswerText()
    for at in range(0, len(text), step):
        grown._take(text[at : at + step])
    drawing = _drawing(40)
    drawing.add(grown._settled)
    drawing.add(grown._tail)
    assert _plain(drawing) == _whole(text)


def test_a_list_hangs_below_its_text() -> None:
    assert _whole("- a\n  1. b\n\n> c") == [
        ("• ", "  ", "• ", "a"),
        ("  1. ", "     ", "1. ", "b"),
        ("", "", "", ""),
        ("▌ ", "▌ ", "", "c"),
    ]


def test_a_table_keeps_every_word_in_the_width_there_is() -> None:
    rows = [line[3] for line in _whole("|name|what|\n|-|-|\n|a|" + "word " * 12 + "|", width=30)]
    assert max(map(len, rows)) <= 30
    assert "".join(rows).count("word") == 12
    assert rows[0].startswith("name │ what")


@pytest.mark.parametrize(
    ("wanted", "room", "widths"),
    [([3, 4], 20, [3, 4]), ([3, 40], 20, [3, 17]), ([30, 40], 20, [10, 10]), ([9, 9], 2, [4, 4])],
)
def test_columns_share_what_room_there_is(wanted: list[int], room: int, widths: list[int]) -> None:
    assert share(wanted, room) == widths
