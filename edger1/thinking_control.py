"""How long a model thinks: a budget at which its thought is closed, and a length before which it cannot end it.

think_budget    at so many tokens of thought the family's end marker, with its blanks, is put behind them as if the
                model had written it, and the answer follows
think_at_least  a thought that is ended earlier goes on: "Wait" stands in the place of its end (s1, arXiv 2501.19393)

A token of thought is one that has some of the thought's text, be it a blank, and none of the marker that opened it; of
the marker that ends it only the part of a token that the thought shares counts. What was put there for the model is
fed as a prompt is, so that caches, drafts and batches need to know nothing of it; where the next token is drawn after
it, the random numbers begin anew from the seed and the place: an answer is the same alone, in a batch and with drafts.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edger1.errors import ContextError
from edger1.messages import Generate
from edger1.thinking import Markers, Splitter

WAIT = "Wait"

Encode = Callable[[str], list[int]]


def wanted(think: str, budget: int | None, at_least: int | None) -> str:
    """Return what the template is told of thinking: what `think` says, or what the bounds on the thought mean."""
    if think != "auto":
        return think
    return "off" if budget == 0 else "on" if at_least else "auto"


@dataclass(frozen=True)
class Ruling:
    """What becomes of an answer instead of what the model has said.

    Its last `dropped` tokens are taken back, and `forced` are said in their place. Of the text of those tokens `keep`
    is said still, and the first `skip` characters of the forced ones have been said already.
    """

    forced: list[int]
    dropped: int = 0
    keep: str = ""
    skip: int = 0


@dataclass
class ThinkingControl:
    """Counts the thought of one answer, and rules over its end. `thought_before` tokens of it are in the prompt."""

    markers: Markers | None
    splitter: Splitter
    encode: Encode
    budget: int | None = None
    at_least: int = 0
    thought_before: int = 0
    tools: bool = False
    notes: list[str] = field(default_factory=list)
    waits: int = 0
    cut: int | None = None

    def __post_init__(self) -> None:
        self._counted = 0
        # Tokens at the end of the thought, some of whose text may yet become a marker: where it begins, and the text.
        self._tail: list[tuple[int, str]] = []
        self._inside = self._opened = self.splitter.in_thought
        self._end = 0
        self._closed = 0
        # The marker is being written for the model.
        self._closing = False

    @property
    def thought_tokens(self) -> int:
        """Tokens of thought in the answer so far."""
        return self._counted + len(self._tail)

    @property
    def left(self) -> int | None:
        """How many tokens the thought under way may still have; None where there is none, or no end to it."""
        if self.budget is None or not self.splitter.in_thought:
            return None
        return max(0, self.budget - self.thought_before - self.thought_tokens)

    def overrules(self, text: str, *, ends: bool) -> Ruling | None:
        """Return what comes in the place of a token with this `text` that would end the thought too early.

        The token may end the whole answer instead, where it `ends` it. None where it stands.
        """
        splitter = self.splitter
        if not self.at_least or not splitter.in_thought or self._closing:
            return None
        lead = "" if ends else splitter.before_end(text)
        if lead is None:
            return None
        said = splitter.thought_chars
        if ends:
            if self._so_far >= self.at_least:
                return None
            self.waits += 1
            return Ruling(self._wait("", splitter.thought_breaks), 1, keep=splitter.pending)
        tail = [*self._tail, (self._end, text)]
        return None if self._enough(tail, said + len(lead)) else self._go_on(tail, lead)

    def _enough(self, tail: list[tuple[int, str]], end: int) -> bool:
        """Whether the thought is long enough if it ends at a character, which `tail` goes beyond."""
        return self.thought_before + self._counted + sum(at < end for at, _ in tail) >= self.at_least

    def _go_on(self, tail: list[tuple[int, str]], lead: str) -> Ruling:
        """Return what takes the marker back that stands in `tail`, behind what `lead` adds to the thought."""
        splitter, said = self.splitter, self.splitter.thought_chars
        end = said + len(lead)
        gone = next((i for i, (at, piece) in enumerate(tail) if at + len(piece) > end), len(tail) - 1)
        begin = tail[gone][0]
        # A token may hold the last of the thought and the first of the marker.
        shared = "".join(piece for _, piece in tail[gone:])[: end - begin] if begin < end else ""
        self._tail = tail[:gone]
        self._end = max(said, begin)
        self.waits += 1
        breaks = lead[-1].isspace() if lead else splitter.thought_breaks
        return Ruling(
            self._wait(shared, breaks), len(tail) - gone, keep=lead[: max(0, begin - said)], skip=max(0, said - begin)
        )

    @property
    def _so_far(self) -> int:
        return self.thought_before + self.thought_tokens

    def _wait(self, shared: str, breaks: bool) -> list[int]:
        return self.encode(shared + ("" if breaks else "\n") + WAIT)

    def note(self, text: str) -> None:
        """Take the text of a token that the splitter has just been fed."""
        splitter, inside = self.splitter, self.splitter.in_thought
        said = splitter.thought_chars
        closed = splitter.thoughts_closed > self._closed
        self._closed = splitter.thoughts_closed
        if self._inside and not self._closing:
            self._tail.append((self._end, text))
        if closed:
            self._counted += sum(at < said for at, _ in self._tail)
            self._tail, self._closing = [], False
        self._end = said + len(splitter.pending)
        while self._tail and self._tail[0][0] < said and self._tail[0][0] + len(self._tail[0][1]) <= said:
            self._counted += 1
            del self._tail[0]
        self._inside = inside

    def closes(self, tokens: Sequence[int]) -> Ruling | None:
        """Return the end of the thought, which stands at the end of `tokens`, where its budget is used up."""
        if self.left != 0 or self._closing or self.markers is None:
            return None
        markers, said = self.markers, self.splitter.thought_chars
        if self.splitter.pending and not self._enough(self._tail, said):
            return self._go_on(self._tail, "")
        self._closing = True
        written = sum(at >= said and bool(piece) for at, piece in self._tail)
        begun, end = list(tokens[len(tokens) - written :]), self.encode(markers.end)
        if written and begun == end[:written]:
            # The model has begun it.
            del self._tail[-written:]
            forced = end[written:] + self.encode(self._rest())
        elif self.splitter.pending and len(end) > 1:
            # In other tokens; a marker that is one token is never begun in any.
            del self._tail[len(self._tail) - written :]
            forced = self.encode(markers.end.removeprefix(self.splitter.pending) + self._rest())
        else:
            forced = self.encode(self._lead() + markers.end + self._rest())
        self._counted += len(self._tail)
        self._tail = []
        if self.cut is None:
            self.cut = self.thought_before + self._counted
        return Ruling(forced)

    def _lead(self) -> str:
        """Return the blanks before the end marker, as far as they are not there."""
        splitter, blank = self.splitter, "" if self.markers is None else self.markers.blank
        if splitter.pending or not splitter.thought_breaks:
            return blank
        if splitter.thought_begun:
            return ""
        # A template that has opened the thought has written the blank behind that.
        return blank if self._opened and not splitter.thoughts_closed else blank * 2

    def _rest(self) -> str:
        markers = self.markers
        assert markers is not None
        if markers.channels and self.tools and self.cut is None:
            # The model may call a tool as well; should it think again, it has to answer.
            return markers.again
        return markers.to_answer.removeprefix(markers.end) + markers.gap

    def closed(self) -> None:
        """Note that what `closes` returned has been said."""
        if self._closing:
            # Its tokens do not give its text back.
            self._closing, self.budget = False, None
            self.notes.append("The thought could not be closed: this tokenizer cannot write its end marker.")

    def told(self, *, full: bool) -> list[str]:
        """Return sentences on what became of the thought; `full` where no room was left for more tokens."""
        notes = list(self.notes)
        if self.waits:
            times = "once" if self.waits == 1 else f"{self.waits} times"
            notes.append(f'The thought was made to go on {times} ("{WAIT}"), up to {self.at_least} tokens.')
        if self.cut:
            notes.append(f"The thought was closed after {self.cut} tokens, its budget.")
        if full and self.splitter.in_thought:
            notes.append(
                "The answer ended in the middle of the thought, with no room for more tokens. Give more with "
                "max_tokens or a larger context, or less to the thought with think_budget."
            )
        return notes


def of(
    request: Generate,
    markers: Markers | None,
    splitter: Splitter,
    encode: Encode,
    *,
    name: str,
    room: int,
    thought_before: int | None,
) -> ThinkingControl:
    """Return the control of a request to the model `name`, whose answer may have `room` tokens.

    `thought_before` are the tokens of a thought that is gone on with, None where none is.
    Raises ContextError where the thought is to be longer than the answer may be.
    """
    least, budget = request.think_at_least or 0, request.think_budget
    before = thought_before or 0
    control = ThinkingControl(markers, splitter, encode, thought_before=before, tools=bool(request.tools))
    if markers is None:
        if least or budget is not None:
            control.notes.append(
                f"{name} does not think between markers that EdgeR1 knows, so that its thinking was left as it is."
            )
        return control
    if least > room + before:
        raise ContextError(
            f"think_at_least is {least}, and the answer can have no more than {room} tokens. Ask for less, or give "
            f"more with max_tokens or a larger context."
        )
    if budget is None and request.think == "off" and request.messages is not None and thought_before is None:
        # Not every template can switch the thought off.
        budget = 0
    if budget is not None and budget >= room + before and budget > 0:
        capped = max(least, before + room * 3 // 4)
        control.notes.append(
            f"The think budget of {budget} tokens leaves no room for an answer in the {room} tokens that there are; it "
            f"was taken as {capped}."
        )
        budget = capped
    control.budget, control.at_least = budget, least
    return control


def thought_in(ids: Sequence[int], marker: str, decode: Callable[[list[int]], str]) -> int:
    """Return how many tokens at the end of `ids` stand behind the last `marker`, which is in their text."""

    def last(count: int) -> str:
        return decode(list(ids[len(ids) - count :]))

    # Both grow with the number of tokens.
    counts = range(len(ids) + 1)
    whole = bisect.bisect_left(counts, True, key=lambda n: marker in last(n))
    thought = last(whole).rpartition(marker)[2]
    return max(0, bisect.bisect_right(counts, len(thought), key=lambda n: len(last(n))) - 1)
