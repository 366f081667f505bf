"""Full-text search: what goes into the index, how any input becomes a query, and what is shown of a hit.

SQLite's tokenizer takes a run of letters for one word, which is wrong for scripts without spaces, and drops emoji. So
each character of those is set apart, in the index and in the query alike; a run of them is then a phrase.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from edger1.tui.clean import clean

LONGEST_QUERY = 500
MOST_WORDS = 32
_BEFORE, _WIDTH = 40, 200

_ALONE = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2190-\u2bff\U0001f000-\U0001faff"  # arrows, signs, emoji
    "\u2e80-\u312f\u31a0-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese, Japanese
)
_WORD = re.compile(r'"([^"]+)"|(\S+)')


@dataclass(frozen=True)
class Query:
    """A search. `match` is for FTS5, None where no word has a letter; `literal` must stand in the text as they are."""

    match: str | None
    literal: tuple[str, ...]
    patterns: tuple[re.Pattern[str], ...]
    """Where the words stand in a text that `fold` was applied to."""

    def __bool__(self) -> bool:
        return bool(self.match or self.literal)


# So many ranges take a while to compile, and the chat starts without them.
@cache
def _set_apart() -> re.Pattern[str]:
    return re.compile(f"([{_ALONE}])")


@cache
def _token() -> re.Pattern[str]:
    return re.compile(f"[{_ALONE}]|[^\\W_{_ALONE}]+")


def indexed(text: str) -> str:
    """Return the form of a text that goes into the index."""
    return _set_apart().sub(r" \1 ", text)


def parse(words: str) -> Query:
    """Read what a user typed: all words must be there, each may be the beginning of one, "quoted" ones are whole."""
    phrases, literal, patterns = [], [], []
    typed = clean(words[:LONGEST_QUERY]).replace("\x00", " ")
    for found in list(_WORD.finditer(typed))[:MOST_WORDS]:
        quoted, word = found.groups()
        tokens = _token().findall(quoted or word)
        if tokens:
            inside = indexed(" ".join(tokens))
            phrases.append(f'"{inside}"' + ("" if quoted else " *"))
        elif word := (quoted or word).strip('"').strip():
            literal.append(word)
        patterns += _pattern(tokens, whole=bool(quoted)) if tokens else [re.compile(re.escape(fold(word)))] * bool(word)
    return Query(" AND ".join(phrases) or None, tuple(literal), tuple(patterns))


def _pattern(tokens: list[str], whole: bool) -> list[re.Pattern[str]]:
    apart = re.compile(f"[{_ALONE}]")
    begin = "" if apart.match(tokens[0]) else r"(?<![^\W_])"
    end = r"(?![^\W_])" if whole and not apart.match(tokens[-1]) else ""
    return [re.compile(begin + r"[\W_]*".join(re.escape(fold(token)) for token in tokens) + end)]


@cache
def _folded(letter: str) -> str:
    return unicodedata.normalize("NFD", letter)[0].lower()[0]


def fold(text: str) -> str:
    """Return a text of the same length, in lower case and without accents."""
    return text.lower() if text.isascii() else "".join(map(_folded, text))


def snippet(text: str, patterns: Sequence[re.Pattern[str]]) -> tuple[str, list[tuple[int, int]]]:
    """Return one line around the first place where one of the words stands, and where in it they stand."""
    folded = fold(text)
    begins = [found.start() for pattern in patterns if (found := pattern.search(folded))]
    begin = max(0, min(begins, default=0) - _BEFORE)
    if begin and (space := text.find(" ", begin, begin + _BEFORE // 2)) > 0:
        begin = space
    line = " ".join(clean(text[begin : begin + _WIDTH]).split())
    line = ("…" if begin else "") + line + ("…" if begin + _WIDTH < len(text) else "")
    return line, marks(line, patterns)


def marks(line: str, patterns: Sequence[re.Pattern[str]]) -> list[tuple[int, int]]:
    """Return where the words stand in a line, in order; what overlaps is joined."""
    folded = fold(line)
    spans = sorted(found.span() for pattern in patterns for found in pattern.finditer(folded) if found.group())
    joined: list[tuple[int, int]] = []
    for begin, end in spans:
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
