"""Reasoning apart from the answer, while both stream.

A reasoning model writes its thought between markers (`<think>` ... `</think>` for DeepSeek-R1 and Qwen3). Text arrives
in pieces that may cut a marker or a stop string in two; mlx-lm's TextStateMachine holds back just what could still
become one, and splits the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Markers:
    """The strings around a thought, such as `<think>` and `</think>`."""

    start: str
    end: str


def begins_in_thought(prompt: str, markers: Markers | None) -> bool:
    """Whether a rendered prompt ends inside a thought, as templates do that write the opening marker themselves."""
    return markers is not None and prompt.rstrip().endswith(markers.start)


class Splitter:
    """Splits streamed text into ("thought" | "answer", text) and notices stop strings in the answer.

    Stop strings are cut off and do not count inside the thought, where a model may well quote them.
    """

    def __init__(self, markers: Markers | None, stop: Iterable[str], in_thought: bool = False) -> None:
        from mlx_lm.generate import TextStateMachine

        transitions: dict[str, list[tuple[str, str | None]]] = {"answer": [(s, None) for s in stop]}
        if markers is not None:
            transitions["answer"].append((markers.start, "thought"))
            transitions["thought"] = [(markers.end, "answer")]
        machine = TextStateMachine({state: edges for state, edges in transitions.items() if edges})
        self._split = machine.split
        self._flush = machine.flush
        self._state: Any = machine.make_state("thought" if in_thought else "answer")
        self.stopped = False
        # Blank lines between the markers and the text belong to the format, not to the text.
        self._at_start = {"thought": True, "answer": markers is not None}

    def feed(self, text: str) -> list[tuple[str, str]]:
        """Take a piece of text; return what is now known, in order. Sets `stopped` at a stop string."""
        if self.stopped or not text:
            return []
        self._state, segments = self._split(self._state, text)
        self.stopped = self._state[0] is None
        return self._clean([(state, piece) for state, piece in segments if state is not None])

    def finish(self) -> list[tuple[str, str]]:
        """Return what was held back, at the end of the text."""
        if self.stopped:
            return []
        self._state, rest, state = self._flush(self._state)
        return self._clean([(state, rest)])

    def _clean(self, segments: list[tuple[str, str]]) -> list[tuple[str, str]]:
        cleaned = []
        for kind, piece in segments:
            if self._at_start[kind]:
                piece = piece.lstrip("\n")
                self._at_start[kind] = not piece
            if piece:
                cleaned.append((kind, piece))
        return cleaned
