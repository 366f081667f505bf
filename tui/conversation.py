"""One conversation as the model sees it."""

from __future__ import annotations

from edger1.messages import Message


class Conversation:
    """Turns of a user and a model, kept so that every question that is sent on has an answer.

    Chat templates commonly refuse two user messages in a row, so a question that got no word of an answer is forgotten
    when its turn ends. Thoughts are never part of it.
    """

    def __init__(self, system: str | None = None) -> None:
        self.system = system
        self._turns: list[tuple[str, list[str]]] = []

    def begin(self, question: str) -> None:
        """Open a turn with what the user says."""
        self._turns.append((question, []))

    def hear(self, text: str) -> None:
        """Add a piece of the answer to the open turn."""
        self._turns[-1][1].append(text)

    def end(self) -> bool:
        """Close the turn; False means that it held no answer and was forgotten."""
        if any(piece.strip() for piece in self._turns[-1][1]):
            return True
        self._turns.pop()
        return False

    def messages(self) -> list[Message]:
        """Everything said so far, in the order and form that the engine takes."""
        messages: list[Message] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for question, answer in self._turns:
            messages.append({"role": "user", "content": question})
            if answer:
                messages.append({"role": "assistant", "content": "".join(answer)})
        return messages
