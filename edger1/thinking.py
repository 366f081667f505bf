"""Reasoning, answer and tool calls apart from each other, while they stream.

A reasoning model writes its thought between markers (`<think>` ... `</think>` for DeepSeek-R1 and Qwen3), a tool call
between others. Text arrives in pieces that may cut a marker or a stop string in two; mlx-lm's TextStateMachine holds
back just what could still become one, and splits the rest.

gpt-oss (harmony) writes messages of several channels instead, each `<|start|>assistant<|channel|>NAME<|message|>` ...
`<|end|>`: "analysis" is its thought, "final" the answer, "commentary to=functions.NAME" a call.

Sky-T1 and Stratos mark the answer as well, as a solution, and end that with a marker of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Markers:
    """The strings around a thought, such as `<think>` and `</think>`.

    `blank` is what the family writes behind the first one and before the second, `gap` what it writes before the
    answer. Where answers have a marker too, that is `answer`, with `again` before it if it comes after a thought, and
    perhaps one at their end, `answer_end`. `channels` says that it is harmony.
    """

    start: str
    end: str
    blank: str = "\n"
    gap: str = "\n\n"
    again: str = ""
    answer: str = ""
    answer_end: str = ""
    channels: bool = False

    @property
    def to_answer(self) -> str:
        """What stands between a thought's text and the answer, but for the gap."""
        return self.end + self.again + self.answer


HARMONY = Markers(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    blank="",
    gap="",
    again="<|start|>assistant",
    answer="<|channel|>final<|message|>",
    channels=True,
)

SOLUTION = Markers(
    "<|begin_of_thought|>",
    "<|end_of_thought|>",
    blank="\n\n",
    again="\n\n",
    answer="<|begin_of_solution|>",
    answer_end="<|end_of_solution|>",
)


_USUAL = Markers("<think>", "</think>")


def split_thought(content: str, markers: Markers | None) -> tuple[str, str]:
    """Return the thought that an assistant's message begins with, and its answer, whatever family wrote it.

    `markers` are those of the model that reads it; a thought that a template of its own had opened may lack the first.
    A thought that is not closed has no answer.
    """
    text = content.lstrip()
    for each in dict.fromkeys((markers or _USUAL, _USUAL, SOLUTION, HARMONY)):
        if text.startswith(each.start):
            thought, _, rest = text.removeprefix(each.start).partition(each.end)
        elif each == markers and not each.channels and each.start not in text and each.end in text:
            thought, _, rest = text.partition(each.end)
        else:
            continue
        rest = rest.lstrip("\n").removeprefix(each.again.strip("\n"))
        if each.answer and rest.startswith(each.answer):
            rest = rest.removeprefix(each.answer)
            rest = rest.rstrip().removesuffix(each.answer_end).rstrip("\n") if each.answer_end in rest else rest
        return thought.strip("\n"), rest.lstrip("\n")
    return "", content


def begins_in_thought(prompt: str, markers: Markers | None) -> bool:
    """Whether a rendered prompt ends inside a thought, as templates do that write the opening marker themselves."""
    return markers is not None and prompt.rstrip().endswith(markers.start)


class Splitter:
    """Splits streamed text into ("thought" | "answer" | "call" | "cut", text) and notices stop strings in the answer.

    `calls` are the markers around tool calls, (start, end) each; without an end a call goes on to the end of the text.
    A "call" comes whole, with its markers; "cut" is the beginning of one that was never closed, and only comes last.
    Stop strings are cut off; they count neither in thoughts, where a model may well quote them, nor in calls.

    `said` tells that some of the thought, or answer, that the text goes on from has been said before.
    """

    def __init__(
        self,
        markers: Markers | None,
        stop: Iterable[str],
        in_thought: bool = False,
        *,
        calls: Sequence[tuple[str, str]] = (),
        said: bool = False,
    ) -> None:
        from mlx_lm.generate import TextStateMachine

        self._calls = calls
        self._channels = markers is not None and markers.channels
        machine = TextStateMachine(_transitions(markers, stop, calls))
        self._split = machine.split
        self._flush = machine.flush
        self._make_state = machine.make_state
        begin = "thought" if in_thought else "header" if self._channels and not said else "answer"
        if said and not in_thought and markers is not None and markers.answer_end:
            begin = "solution"
        self._state: Any = machine.make_state(begin)
        self.stopped = False
        # Blank lines between the markers and the text belong to the format, not to the text.
        self._at_start = {"thought": True, "answer": markers is not None, "solution": True}
        if said:
            self._at_start[begin] = False
        # A call, or the header of a message, as far as it has come.
        self._held = ""
        self.thought_chars = 0
        """Characters of thought so far, blanks included, but for what may become a marker."""
        self.thoughts_closed = 0
        """How many thoughts have come to their end."""
        self._ending = ""

    @property
    def in_thought(self) -> bool:
        """Whether what comes next belongs to a thought, or to the marker that ends it."""
        return bool(self._state[0] == "thought")

    @property
    def pending(self) -> str:
        """The end of the text, which may become a marker."""
        return str(self._state[3])

    @property
    def thought_breaks(self) -> bool:
        """Whether the thought has just begun or stands behind a blank."""
        return not self._ending or self._ending.isspace()

    @property
    def thought_begun(self) -> bool:
        """Whether the thought under way has any text, blanks included."""
        return bool(self._ending)

    def before_end(self, text: str) -> str | None:
        """Return what `text` adds to the thought if it ends it (held text included); None where it does not end it."""
        if not self.in_thought or not text:
            return None
        _, segments = self._split(self._state, text)
        return str(segments[0][1]) if len(segments) > 1 else None

    def let_go(self) -> None:
        """Forget what is held: the tokens that it came from are taken back."""
        self._state = self._make_state(self._state[0])

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Take a piece of text; return what is now known, in order. Sets `stopped` at a stop string."""
        if self.stopped or not text:
            return []
        self._state, segments = self._split(self._state, text)
        self.stopped = self._state[0] is None
        known: list[tuple[str, str]] = []
        for i, (state, piece) in enumerate(segments):
            left = i + 1 < len(segments)
            if state == "thought":
                self.thought_chars += len(piece)
                self.thoughts_closed += left
                self._ending = "" if left else piece[-1:] or self._ending
            if state is not None:
                known += self._take(state, piece, left=left)
        return known

    def finish(self, *, whole: bool = True) -> list[tuple[str, str]]:
        """Return what was held back, at the end of the text; a call without end is one if the text is `whole`."""
        if self.stopped:
            return []
        self._state, rest, state = self._flush(self._state)
        if state in self._at_start:
            return self._take(state, rest, left=False)
        held, self._held = self._held + rest, ""
        if state == "header":
            # A model that keeps to no channel has spoken all the same.
            text = held.removeprefix("<|start|>").removeprefix("assistant")
            return [("answer", text)] if text.strip() and "<|" not in text else []
        return [("call" if whole else "cut", self._calls[int(state)][0] + held)]

    def _take(self, state: str, piece: str, *, left: bool) -> list[tuple[str, str]]:
        """Take a piece of text in a state, which is `left` behind it."""
        if state in self._at_start:
            if self._at_start[state]:
                piece = piece.lstrip("\n")
                self._at_start[state] = not piece
            if left:
                self._at_start["answer" if state == "solution" else "solution"] = True
            kind = "answer" if state == "solution" else state
            return [(kind, piece)] if piece else []
        self._held += piece
        if not left:
            return []
        held, self._held = self._held, ""
        if state == "header":
            return []
        self._at_start["answer"] = True
        start, end = self._calls[int(state)]
        return [("call", start + held + end)]


def _transitions(
    markers: Markers | None, stop: Iterable[str], calls: Sequence[tuple[str, str]]
) -> dict[str, list[tuple[str, str | None]]]:
    """Return state -> [(string that ends it, the state that follows)]; calls are the states "0", "1" ..."""
    channels = markers is not None and markers.channels
    rest = "header" if channels else "answer"
    edges: dict[str, list[tuple[str, str | None]]] = {"answer": [(s, None) for s in stop], "thought": [], "header": []}
    if markers is not None and markers.answer_end:
        edges["solution"] = [*edges["answer"], (markers.answer_end, "answer")]
        edges["answer"].append((markers.answer, "solution"))
    if markers is not None:
        edges[rest].append((markers.start, "thought"))
        edges["thought"].append((markers.end, rest))
    if channels:
        edges["header"] += [("<|message|>", "answer")]
        edges["answer"].append(("<|end|>", "header"))
    for i, (start, end) in enumerate(calls):
        edges[rest].append((start, str(i)))
        edges[str(i)] = [(end, rest)] if end else []
    return edges
