"""Thoughts are counted, closed and made to go on wherever the tokens cut them and their markers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from edger1.thinking import HARMONY, Markers, Splitter
from edger1.thinking_control import Ruling, ThinkingControl, thought_in

MARKERS = Markers("<t>", "</t>", blank="\n", gap="\n\n")
CUTS = st.lists(st.integers(1, 40), max_size=30)
THOUGHT = st.text("ab <\n/", max_size=30)


class Answer:
    """An answer whose tokens are any pieces of text, as `Generation` has one."""

    def __init__(
        self, *, markers: Markers = MARKERS, budget: int | None = None, at_least: int = 0, tools: bool = False
    ):
        self._pieces: list[str] = []
        self.tokens: list[int] = []
        self.segments: list[tuple[str, str]] = []
        self.splitter = Splitter(markers, [], in_thought=True)
        self.control = ThinkingControl(markers, self.splitter, self.encode, budget, at_least, tools=tools)

    def encode(self, text: str) -> list[int]:
        return [self._id(letter) for letter in text]

    def _id(self, piece: str) -> int:
        if piece not in self._pieces:
            self._pieces.append(piece)
        return self._pieces.index(piece)

    def hear(self, text: str, cuts: list[int]) -> bool:
        """Take what a model says, cut into tokens at some places; True where it was interrupted."""
        for a, b in pairwise([0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]):
            piece = text[a:b]
            self.tokens.append(self._id(piece))
            ruling = self.control.overrules(piece, ends=False)
            if ruling is None:
                self._say(piece)
                ruling = self.control.closes(self.tokens)
            if ruling is not None:
                self._obey(ruling)
                return True
        return False

    def _obey(self, ruling: Ruling) -> None:
        if ruling.dropped:
            del self.tokens[-ruling.dropped :]
            self.splitter.let_go()
            self.segments += self.splitter.feed(ruling.keep)
        skip = ruling.skip
        for token in ruling.forced:
            piece = self._pieces[token]
            self.tokens.append(token)
            self._say(piece[skip:])
            skip = max(0, skip - len(piece))
        self.control.closed()

    def _say(self, piece: str) -> None:
        self.segments += self.splitter.feed(piece)
        self.control.note(piece)

    @property
    def text(self) -> str:
        return "".join(self._pieces[token] for token in self.tokens)

    def said(self, kind: str) -> str:
        return "".join(text for each, text in self.segments if each == kind)


def tokens_of(thought: str, whole: str, cuts: list[int]) -> int:
    """Tokens of `whole` that have some of the `thought` it begins with."""
    begins = [0, *sorted({cut for cut in cuts if cut < len(whole)})]
    return sum(begin < len(thought) for begin in begins)


@given(THOUGHT, CUTS)
def test_a_token_counts_if_some_of_the_thought_is_in_it(thought: str, cuts: list[int]) -> None:
    whole = thought + "</t>\n\nYes"
    answer = Answer()
    assert not answer.hear(whole, cuts)
    assert answer.control.thought_tokens == tokens_of(thought, whole, cuts)
    assert answer.said("answer") == "Yes"


@given(THOUGHT, CUTS, st.integers(0, 12))
def test_no_thought_has_more_tokens_than_its_budget(thought: str, cuts: list[int], budget: int) -> None:
    whole = thought + "</t>\n\nYes"
    answer = Answer(budget=budget)
    if budget == 0:
        return
    cut = answer.hear(whole, cuts)
    if not cut:
        assert tokens_of(thought, whole, cuts) <= budget
        return
    assert answer.control.thought_tokens <= budget
    # It is what the model has said, closed as the family closes it.
    begun, closing, rest = answer.text.rpartition("</t>")
    assert (closing, rest) == ("</t>", "\n\n")
    assert thought.startswith(begun) or thought.startswith(begun.removesuffix("\n"))
    assert answer.splitter.thoughts_closed == 1
    assert not answer.splitter.in_thought


@given(THOUGHT, CUTS, THOUGHT, CUTS)
def test_wait_takes_the_place_of_the_marker_alone(first: str, cuts: list[int], second: str, more: list[int]) -> None:
    answer = Answer(at_least=1000)
    assert answer.hear(first + "</t>\n\nYes", cuts)
    waited = first + ("" if not first or first[-1].isspace() else "\n") + "Wait"
    assert answer.text == waited
    answer.control.at_least = 0
    assert not answer.hear(second + "</t>\n\nYes", more)
    assert answer.said("thought") == (waited + second).lstrip("\n")
    assert answer.said("answer") == "Yes"
    assert answer.text == waited + second + "</t>\n\nYes"


def test_a_marker_that_the_model_has_begun_is_completed() -> None:
    answer = Answer(budget=4)
    assert answer.hear("ab </t", [1, 2, 3, 4, 5])
    assert answer.text == "ab </t>\n\n"
    assert answer.control.thought_tokens == 3
    # Cut otherwise than the family writes it.
    odd = Answer(budget=4)
    assert odd.hear("abc</t", [1, 2, 3])
    assert odd.text == "abc</t>\n\n"


def test_a_model_with_tools_may_call_one_after_its_thought_was_closed() -> None:
    answer = Answer(markers=HARMONY, budget=2, tools=True)
    assert answer.hear("abc", [1, 2])
    assert answer.text == "ab<|end|><|start|>assistant"
    # It thinks again instead.
    assert answer.hear("<|channel|>analysis<|message|>", [])
    assert answer.text.endswith("<|message|><|end|><|start|>assistant<|channel|>final<|message|>")
    alone = Answer(markers=HARMONY, budget=2)
    assert alone.hear("abc", [1, 2])
    assert alone.text == "ab<|end|><|start|>assistant<|channel|>final<|message|>"


@given(st.text("ab<t>", min_size=1, max_size=20), st.integers(0, 20))
def test_tokens_of_a_thought_in_a_prompt_are_counted(thought: str, cut: int) -> None:
    text = f"x<t>y<t>{thought}" if "<t>" not in thought else "<t>a"
    ids = [ord(letter) for letter in text]
    assert thought_in(ids, "<t>", lambda ids: "".join(map(chr, ids))) == len(text.rpartition("<t>")[2])
