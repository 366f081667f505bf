"""What an answer has said: its tokens, and what of them is text, thought or call and has been told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edger1.context_shift import ContextShift
from edger1.messages import Event, Generate, Text, Thought, ToolCall
from edger1.seam import Detokenizer
from edger1.thinking import Splitter
from edger1.thinking_control import Ruling, ThinkingControl
from edger1.tool_calls import CallFormat, MalformedCallError


class Said:
    """The answer to one request, of `most` tokens at most; what is added is sent through `emit` as it becomes clear."""

    def __init__(
        self,
        request: Generate,
        emit: Callable[[Event], None],
        calls: CallFormat,
        splitter: Splitter,
        detokenizer: Detokenizer,
        control: ThinkingControl,
        most: int,
    ) -> None:
        self._request = request
        self._emit = emit
        self._format = calls
        self.splitter = splitter
        self.detokenizer = detokenizer
        self.control = control
        self.most = most
        self.tokens: list[int] = []
        self.finish: str | None = None
        """Why the answer is over, None where it goes on."""
        self.calls = 0
        self.notes: list[str] = []

    def add_text(self, text: str) -> None:
        """Send the text of a token that has been added."""
        self.send(self.splitter.feed(text))
        self.control.note(text)
        if self.splitter.stopped:
            self.finish = "stop"
        elif len(self.tokens) >= self.most:
            self.finish = "length"

    def closing(self) -> Ruling | None:
        """Return what ends the thought, where its budget is used up."""
        return self.control.closes(self.tokens) if self.finish is None else None

    def end(self) -> None:
        """Send what was held back, at the end of the answer."""
        self.send(self.splitter.finish(whole=self.finish == "stop"))
        if self.splitter.stopped and self.finish == "length":
            # The stop string's last character waited for a token that did not come.
            self.finish = "stop"

    def note_full(self, shift: ContextShift | None, context: int) -> bool:
        """Note what a context of `context` tokens that is full has done to the answer; whether it has ended it."""
        if shift is not None and shift.times:
            self.notes.append(shift.note())
        if self.finish != "length" or self.splitter.stopped or len(self.tokens) == self._request.max_tokens:
            return False
        where = " in the middle of a thought" if self.splitter.in_thought else ""
        if shift is None:
            self.notes.append(
                f"The context of {context} tokens is full, and the answer ends{where}. Give a larger context with "
                f"--context, or let the oldest tokens go with --context-shift."
            )
        else:
            self.notes.append(
                f"The answer is as long as the context, and ends{where}. Give --max-tokens for a longer one."
            )
        return True

    @property
    def reason(self) -> str:
        """The reason that its Done gives."""
        return "tools" if self.calls and self.finish == "stop" else self.finish or "stop"

    def send(self, segments: Sequence[tuple[str, str]]) -> None:
        """Send what a splitter has found."""
        for kind, text in segments:
            if kind == "call":
                self._call(text)
                continue
            if kind == "cut":
                self.notes.append("The answer ended in the middle of a tool call, which stands in the text.")
            self._emit(Thought(self._request.id, text) if kind == "thought" else Text(self._request.id, text))

    def _call(self, block: str) -> None:
        try:
            calls = self._format.read(block, self._request.tools)
        except MalformedCallError as error:
            self.notes.append(f"A tool call cannot be read ({error}); it stands in the text.")
            self._emit(Text(self._request.id, block))
            return
        self.calls += len(calls)
        for call in calls:
            self._emit(ToolCall(self._request.id, call["name"], call["arguments"], call["id"]))
