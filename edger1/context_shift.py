"""Going on where the context is full: what is in its middle is dropped. Only for those who ask for it.

The oldest turns of a conversation go first, whole, as if the messages had never been there; the system prompt and the
last turn stay. Where no turns are left, or none are known, tokens go: the first quarter of the context at most stays
(the prompt, or its beginning), and of what follows the older half is dropped, at least.

What is kept is fed again behind the last token that did not move. Shifting the cached keys to their new positions
would save that, and be wrong: each of them was computed from tokens that are not there any more.

Turns are dropped a quarter of the context at a time, so that the next turn of a conversation finds the same ones gone,
and with that the cache of the turn before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edger1.errors import UsageError
from edger1.messages import Message

Encode = Callable[[list[Message]], tuple[str, list[int]]]
"""Renders messages as a prompt, and returns it and its tokens."""


class ContextShift:
    """What of one request was dropped so far."""

    def __init__(self, context: int, messages: Sequence[Message] | None, encode: Encode) -> None:
        self._context = context
        self._step = max(1, context // 4)
        self._messages = list(messages or ())
        self._encode = encode
        self._head: int | None = None
        self.text = ""
        """What the prompt reads without the turns that went; "" where tokens went."""
        self.times = 0
        self.turns = 0
        self.tokens = 0
        """How often something was dropped, and how many whole turns and tokens that were in all."""

    def fit(self, prompt: list[int], answer: int | None) -> list[int]:
        """Return a prompt beside which an answer of `answer` tokens has room, a quarter of the context at most."""
        least = len(prompt) + min(answer or self._step, self._step) - self._context
        return prompt if least <= 0 else self._drop(prompt, [], least)[0]

    def go_on(self, before: list[int], answer: list[int]) -> tuple[list[int], bool]:
        """Return what comes before the answer from now on, and whether the answer's tokens so far are part of that.

        `before` is what came before `answer` until now; a quarter of the context at least becomes free.
        """
        return self._drop(before, answer, len(before) + len(answer) + self._step - self._context)

    def note(self) -> str:
        """Say what was dropped, for people."""
        turns = "" if not self.turns else "the oldest turn" if self.turns == 1 else f"the {self.turns} oldest turns"
        what = f", {turns} among them" if turns else ""
        return (
            f"The context of {self._context} tokens was full: {self.tokens} tokens in its middle were dropped{what}, "
            f"and the model no longer knows them."
        )

    def _drop(self, before: list[int], answer: list[int], least: int) -> tuple[list[int], bool]:
        known = len(before) + len(answer)
        self.times += 1
        before, freed = self._without_turns(before, -(-least // self._step) * self._step)
        inside = freed < least
        if inside:
            before = self._without_middle(before + answer, len(before), least - freed)
        self.tokens += known - len(before) - (0 if inside else len(answer))
        return before, inside

    def _without_turns(self, before: list[int], wanted: int) -> tuple[list[int], int]:
        """Drop as many of the oldest turns as free `wanted` tokens, or all but the last; returns how many they free."""
        roles = [message.get("role") for message in self._messages]
        first = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
        starts = [i for i in range(first, len(roles)) if roles[i] == "user"]
        few, many = 1, len(starts) - 1
        if many < 1 or self._head is not None:
            return before, 0
        try:
            while few < many:
                middle = (few + many) // 2
                if len(before) - len(self._encode(self._from(first, starts[middle]))[1]) >= wanted:
                    many = middle
                else:
                    few = middle + 1
            messages = self._from(first, starts[many])
            text, kept = self._encode(messages)
        except UsageError:
            # Some templates want what is dropped; tokens can still go.
            return before, 0
        if len(kept) >= len(before):
            return before, 0
        self._messages, self.text = messages, text
        self.turns += many
        return kept, len(before) - len(kept)

    def _from(self, first: int, start: int) -> list[Message]:
        return self._messages[:first] + self._messages[start:]

    def _without_middle(self, known: list[int], prompt: int, least: int) -> list[int]:
        self.text = ""
        if self._head is None:
            self._head = min(prompt, self._step)
        head, rest = known[: self._head], known[self._head :]
        return head + rest[min(max(least, len(rest) // 2), len(rest) - 1) :]
