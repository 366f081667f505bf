"""Which of many names a few letters mean.

A name matches where it has the letters in their order. Textual's own search tries every way in which they can lie, and
their number grows exponentially ("aaaaaaaa" in a folder of a's); this one looks at two, so that ranking 20,000 names
costs a few hundredths of a second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SCORED_MAX = 1_000
"""Matches that are scored; a query that more names match says too little for their order to matter."""


def rank(query: str, names: Sequence[str], limit: int) -> list[int]:
    """Return the indices of the names that match best, the best first; equal ones stay in their order.

    An empty query matches all of them. Case makes no difference.
    """
    if not query:
        return list(range(min(limit, len(names))))
    letters = query.lower()
    # Each step goes to the next place of its letter and has no other way, so that a search never goes back.
    has = re.compile("".join(f"[^{re.escape(each)}]*+{re.escape(each)}" for each in letters)).match
    hits = []
    for index, name in enumerate(names):
        if has(name.lower()):
            hits.append(index)
            if len(hits) == SCORED_MAX:
                break
    scored = [(-score(letters, names[index]), index) for index in hits]
    scored.sort()
    return [index for _, index in scored[:limit]]


def score(query: str, name: str) -> float:
    """Return how well a name that has the query's letters matches: more is better.

    Letters side by side, at the beginnings of words and in the last part of a path count; so does a short name.
    """
    places = positions(query, name)
    if not places:
        return 0.0
    tail = name.rstrip("/").rfind("/") + 1
    total = 0.0
    before = -2
    for place in places:
        total += 1.0 + (place == before + 1) * 1.5 + _begins(name, place) * 1.0 + (place >= tail) * 0.5
        before = place
    return total / len(places) - len(name) * 0.002 + (name[tail:].lower().startswith(query)) * 1.0


def positions(query: str, name: str) -> list[int]:
    """Return where the query's letters lie in the name: as one piece where they do, in the last part of a path where
    they do, else each at its first place. Empty where they are not all there.
    """
    letters, text = query.lower(), name.lower()
    if not letters or len(text) != len(name):
        # A few letters, as the Turkish dotted I, change their number with their case.
        text = name
        letters = query
    tail = text.rstrip("/").rfind("/") + 1
    for begin in (tail, 0):
        if (at := text.find(letters, begin)) >= 0:
            return list(range(at, at + len(letters)))
    for begin in (tail, 0):
        if places := _greedy(letters, text, begin):
            return places
    return []


def _greedy(letters: str, text: str, begin: int) -> list[int]:
    places = []
    for letter in letters:
        begin = text.find(letter, begin) + 1
        if not begin:
            return []
        places.append(begin - 1)
    return places


def _begins(name: str, place: int) -> bool:
    """Return whether a word begins at a place: after what is no letter, or a capital after a small one."""
    if place == 0:
        return True
    before = name[place - 1]
    return not before.isalnum() or (name[place].isupper() and before.islower())
