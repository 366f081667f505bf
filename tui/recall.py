"""Walking through what was typed before."""

from __future__ import annotations

from collections.abc import Sequence


class Recall:
    """One walk through the history, latest last. It begins from a draft, which comes back at its end.

    Only what begins with the draft is met, and nothing twice in a row.
    """

    def __init__(self, history: Sequence[str], draft: str) -> None:
        self.draft = draft
        self._met = [draft]
        for text in reversed(history):
            if text.startswith(draft) and text not in (self._met[-1], draft):
                self._met.append(text)
        self._at = 0

    @property
    def text(self) -> str:
        """What is shown: the draft, or something older."""
        return self._met[self._at]

    def step(self, back: int) -> str | None:
        """Go `back` (1) or forth (-1); None where it ends there."""
        at = self._at + back
        if not 0 <= at < len(self._met):
            return None
        self._at = at
        return self.text


def matches(history: Sequence[str], words: str, limit: int) -> list[str]:
    """Return what has all the words in it, whatever their case and order, latest first and each once."""
    wanted = words.lower().split()
    found: dict[str, None] = {}
    for text in reversed(history):
        lowered = text.lower()
        if all(word in lowered for word in wanted):
            found.setdefault(text)
            if len(found) == limit:
                break
    return list(found)
