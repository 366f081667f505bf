"""Reasoning, answer and stop strings, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edger1.thinking import SOLUTION, Markers, Splitter, begins_in_thought

THINK = Markers("<think>", "</think>")


def split(pieces: list[str], **options: object) -> tuple[str, str, bool]:
    splitter = Splitter(THINK, options.get("stop", ()), options.get("in_thought", False))  # type: ignore[arg-type]
    segments = [segment for piece in pieces for segment in splitter.feed(piece)] + splitter.finish()
    thought = "".join(text for kind, text in segments if kind == "thought")
    answer = "".join(text for kind, text in segments if kind == "answer")
    return thought, answer, splitter.stopped


@given(st.lists(st.integers(1, 45), max_size=12))
def test_markers_are_found_wherever_the_text_is_cut(cuts: list[int]) -> None:
    text = "<think>\nLet me see: 2 < 3.\n</think>\n\nYes.\nIt is."
    edges = [0, *sorted(set(cuts)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert split(pieces) == ("Let me see: 2 < 3.\n", "Yes.\nIt is.", False)


def test_a_template_may_have_opened_the_thought() -> None:
    assert begins_in_thought("<|assistant|><think>\n", THINK)
    assert not begins_in_thought("<think></think>", THINK)
    assert not begins_in_thought("<think>", None)
    assert split(["so ", "so</th", "ink>done"], in_thought=True) == ("so so", "done", False)


def test_an_unclosed_thought_stays_a_thought() -> None:
    assert split(["<think>never", " ends</thi"]) == ("never ends</thi", "", False)


@given(st.lists(st.integers(1, 18), max_size=6))
def test_stop_strings_end_the_answer_and_are_cut_off(cuts: list[int]) -> None:
    text = "one two END three four"
    edges = [0, *sorted(set(cuts)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert split(pieces, stop=["END", "four"]) == ("", "one two ", True)


def test_stop_strings_do_not_count_inside_the_thought() -> None:
    assert split(["<think>END</think>yes END no"], stop=["END"]) == ("END", "yes ", True)


def test_half_a_stop_string_is_text() -> None:
    assert split(["the EN"], stop=["END"]) == ("", "the EN", False)


SOLVED = (
    "<|begin_of_thought|>\n\nSo.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nYes\n\n<|end_of_solution|>\n\nEND more"
)


@given(st.lists(st.integers(1, len(SOLVED) - 1), max_size=12))
def test_the_markers_of_a_solution_are_no_part_of_it(cuts: list[int]) -> None:
    splitter = Splitter(SOLUTION, ["END"])
    edges = [0, *sorted(set(cuts)), len(SOLVED)]
    segments = [segment for a, b in pairwise(edges) for segment in splitter.feed(SOLVED[a:b])] + splitter.finish()
    assert "".join(text for kind, text in segments if kind == "thought") == "So.\n\n"
    assert "".join(text for kind, text in segments if kind == "answer") == "Yes\n\n"
    assert splitter.stopped


def test_a_solution_goes_on_behind_its_marker() -> None:
    splitter = Splitter(SOLUTION, (), said=True)
    assert splitter.feed("s.<|end_of_solution|>") + splitter.finish() == [("answer", "s.")]
