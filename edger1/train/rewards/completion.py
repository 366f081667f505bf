"""A completion as rewards see it: the thought apart from the answer, and the row's columns beside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Completion:
    """What a model wrote for a prompt."""

    prompt: list[dict[str, Any]] | str
    """The messages, or the raw text that was continued."""
    text: str
    """All of it, thought and markers included; `<think>` stands in front also where the template opened the thought."""
    thinking: str | None
    """The text between the thought's markers; None where the model did not think."""
    answer: str
    """What comes after the thought, without surrounding blanks; empty where the thought never ended."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The row's other columns, such as the right answer."""
    tokens: int = 0
    """Tokens of the whole completion."""
    finished: bool = True
    """Whether the model ended it, rather than the limit on tokens."""
    where: str = ""
    """The row, for messages: a file and line, or a number."""

    @classmethod
    def from_text(
        cls,
        prompt: list[dict[str, Any]] | str,
        text: str,
        *,
        columns: dict[str, Any] | None = None,
        tokens: int = 0,
        finished: bool = True,
        where: str = "",
        markers: tuple[str, str] = THINK,
        in_thought: bool = False,
    ) -> Completion:
        """Split what a model wrote, special tokens of the end already cut off.

        `markers` are the model's own; the texts get `<think>` and `</think>` in their place. `in_thought`: the prompt
        ended inside a thought, as templates do that write the opening marker themselves.
        """
        if markers != THINK:
            text = text.replace(markers[0], THINK[0]).replace(markers[1], THINK[1])
        if in_thought:
            text = f"{THINK[0]}\n{text}" if not text.startswith("\n") else THINK[0] + text
        thinking, answer = split_thought(text)
        return cls(prompt, text, thinking, answer, dict(columns or {}), tokens, finished, where)

    def question(self) -> str:
        """Return the prompt's text: of the last user message, or all of a raw prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        users = [message for message in self.prompt if message.get("role") == "user"]
        return str(users[-1].get("content", "")) if users else ""


def split_thought(text: str) -> tuple[str | None, str]:
    """Split a completion into its thought and its answer.

    The thought ends with the first `</think>`. One that never ends takes everything, and leaves an empty answer; an
    end without a beginning counts as begun by the prompt. Text before the beginning is part of the answer.
    """
    start, end = THINK
    before, opened, rest = text.partition(start)
    if not opened:
        thought, closed, answer = text.partition(end)
        return (thought.strip(), answer.strip()) if closed else (None, text.strip())
    thought, closed, answer = rest.partition(end)
    if not closed:
        return thought.strip(), ""
    return thought.strip(), f"{before.strip()}\n{answer.strip()}".strip()
