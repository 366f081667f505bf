"""Where an answer goes on from what was said before: no character is lost there, none comes twice."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

_TAIL = 8
"""Tokens before the seam that decide on what is written behind it: a word, or the bytes of a character."""


class Detokenizer:
    """Turns tokens into text as they come, through mlx-lm's detokenizer.

    `before` are the ids that the text goes on from, where it does: a tokenizer may leave out a blank at the beginning
    of a text that it writes in the middle, and hold one back that was said already.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._inner = tokenizer.detokenizer
        self._said = ""
        if before:
            for token in before[-_TAIL:]:
                self._inner.add_token(token)
            _ = self._inner.last_segment
            ended = copy.copy(self._inner)
            ended.finalize()
            self._said = ended.last_segment

    def add(self, token: int) -> str:
        """Take a token; return the text that is now known."""
        self._inner.add_token(token)
        return self._new()

    def end(self) -> str:
        """Return what was held back, without a character of which only a part has come."""
        self._inner.finalize()
        return self._new().rstrip("\ufffd")

    def _new(self) -> str:
        text = str(self._inner.last_segment)
        if text and self._said:
            text, self._said = text.removeprefix(self._said), ""
        return text
