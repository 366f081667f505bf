"""Reasoning, answer and tool calls apart from each other, while they stream.

A reasoning model writes its thought between markers (`<think>` ... `</think>` for DeepSeek-R1 and Qwen3), a tool call
between others. Text arrives in pieces that may cut a marker or a stop string in two; mlx-lm's TextStateMachine holds
back just what could still become one, and splits the rest.

gpt-oss (harmony) writes messages of several channels instead, each `<|start|>assistant<|channel|>NAME<|message|>` ...
`<|end|>`: "analysis" is its thought, "final" the answer, "commentary to=functions.NAME" a call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Markers:
    """The strings around a thought, such as `<think>` and `</think>`.

    `blank` is what the family writes behind the first one, and twice behind the last. Where answers have a marker too,
    that is `answer`, with `again` before it if it comes after a thought. `channels` says that it is harmony.
    """

    start: str
    end: str
    blank: str = "\n"
    again: str = ""
    answer: str = ""
    channels: bool = False


HARMONY = Markers(
    "<|channel|>analysis<|message|>",
    "<|end|>",
    blank="",
    again="<|start|>assistant",
    answer="<|channel|>final<|message|>",
    channels=True,
)


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
        begin = "thought" if in_thought else "header" if self._channels and not said else "answer"
        self._state: Any = machine.make_state(begin)
        self.stopped = False
        # Blank lines between the markers and the text belong to the format, not to the text.
        self._at_start = {"thought": True, "answer": markers is not None}
        if said:
            self._at_start[begin] = False
        # A call, or the header of a message, as far as it has come.
        self._held = ""

    @property
    def in_thought(self) -> bool:
        """Whether what was fed ends in the middle of a thought."""
        return bool(self._state[0] == "thought")

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Take a piece of text; return what is now known, in order. Sets `stopped` at a stop string."""
        if self.stopped or not text:
            return []
        self._state, segments = self._split(self._state, text)
        self.stopped = self._state[0] is None
        known: list[tuple[str, str]] = []
        for i, (state, piece) in enumerate(segments):
            if state is not None:
                known += self._take(state, piece, left=i + 1 < len(segments))
        return known

    def finish(self, *, whole: bool = True) -> list[tuple[str, str]]:
        """Return what was held back, at the end of the text; a call without end is one if the text is `whole`."""
        if self.stopped:
            return []
        self._state, rest, state = self._flush(self._state)
        if state in ("thought", "answer"):
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
            return [(state, piece)] if piece else []
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
