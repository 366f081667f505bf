"""Drafts from the text itself: what followed the last few tokens where they stood before, in the prompt or the answer.

No model is asked. It is right where an answer quotes, repeats or edits what it was given (prompt look-up decoding, A.
Saxena 2023; LLMA, arXiv 2304.04487). Of all earlier places the one whose tokens agree longest with the end is taken, of
several the latest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_LEAST = 2
"""Tokens that must agree."""
_LONGEST = 32
"""Tokens after which a longer agreement makes no difference."""
_PLACES = 16
"""How many places of the same two tokens are compared: the latest ones."""


@dataclass(frozen=True)
class Match:
    """`tokens` followed the last `agreed` tokens where these stood before."""

    tokens: list[int]
    agreed: int


class Lookup:
    """An index of the places of all pairs of neighbours in one growing sequence of tokens."""

    def __init__(self) -> None:
        self._places: dict[tuple[int, int], list[int]] = {}
        self._indexed = _LEAST

    def find(self, tokens: Sequence[int], most: int) -> Match | None:
        """Return what may follow `tokens`, `most` tokens at most; each call's tokens begin with those of the last."""
        end = len(tokens)
        # The end itself is no earlier place, so it is indexed by the next call.
        for at in range(self._indexed, end):
            self._places.setdefault((tokens[at - 2], tokens[at - 1]), []).append(at)
        self._indexed = max(self._indexed, end)
        if end < _LEAST + 1 or most < 1:
            return None
        best, longest = 0, 0
        for at in reversed(self._places.get((tokens[-2], tokens[-1]), ())[-_PLACES:]):
            agreed = _LEAST
            while agreed < min(_LONGEST, at) and tokens[at - agreed - 1] == tokens[end - agreed - 1]:
                agreed += 1
            if agreed > longest:
                best, longest = at, agreed
        if not longest:
            return None
        return Match(_continued(tokens, best, most), longest)


def _continued(tokens: Sequence[int], at: int, count: int) -> list[int]:
    """Return `count` tokens from `at` on; what runs past the end goes on with what was found, as a repetition does."""
    found = list(tokens[at : at + count])
    while len(found) < count:
        found.append(found[len(found) - (len(tokens) - at)])
    return found
