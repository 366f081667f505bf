"""What a dataset is like, before anything is trained on it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from edger1.train.datasets.rows import THINK, Row
from edger1.train.datasets.splitting import content_text, deduplicate
from edger1.train.datasets.template import Encoding

_PERCENTILES = (5, 25, 50, 75, 95, 99)
_BAR = 32
_LOOKED_AT = 2000
_CHARACTERS = 2000

_SCRIPTS = {
    "Japanese": re.compile(r"[\u3040-\u30ff]"),
    "Chinese": re.compile(r"[\u3400-\u9fff\uf900-\ufaff]"),
    "Korean": re.compile(r"[\uac00-\ud7af\u1100-\u11ff]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Hebrew": re.compile(r"[\u0590-\u05ff]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
    "Thai": re.compile(r"[\u0e00-\u0e7f]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
}
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")
_STOP_WORDS = {
    "English": "the and of to is in that for it with are this be on you what how",
    "French": "le la les des et est une dans que pour qui sur pas avec vous du",
    "German": "der die das und ist nicht ein eine zu mit den von auf für wie ich",
    "Spanish": "el los las que y en es una por para con del se como su lo",
    "Italian": "il che di è per una sono con non del della gli nel come si più",
    "Portuguese": "o os que e em é uma para com não do da se como por mais",
    "Dutch": "het een van en is dat niet op te zijn voor met aan er ook wat",
}
_STOPS = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}


@dataclass(frozen=True)
class Statistics:
    """Figures of a dataset; `lines()` says them to a reader."""

    rows: int
    documents: int
    tokens: int
    counted: int
    longest: int
    quantiles: dict[int, int] = field(default_factory=dict)
    """Percentile -> document length in tokens."""
    histogram: list[tuple[int, int]] = field(default_factory=list)
    """(longest length, documents) of each bin: powers of two."""
    reasoning: float = 0.0
    """Share of rows with a thought."""
    languages: dict[str, float] = field(default_factory=dict)
    """Share of rows by language, or script, largest first; of up to 2,000 rows, evenly spread."""
    repeated: int = 0
    """Rows that repeat an earlier one, but for case and punctuation."""
    notes: tuple[str, ...] = ()
    """What was cut and dropped."""

    def lines(self) -> list[str]:
        """Return the figures as lines of text, with a histogram of lengths."""
        lines = []
        if self.documents:
            lines.append(
                f"{self.rows:,} rows, {self.documents:,} documents, {self.tokens:,} tokens, of which {self.counted:,} "
                f"({self.counted / self.tokens:.0%}) are learned"
            )
        if self.quantiles:
            of = ", ".join(f"{p}%: {length:,}" for p, length in self.quantiles.items())
            lines.append(f"tokens a document: {of}, longest {self.longest:,}")
        most = max((count for _, count in self.histogram), default=1)
        for top, count in self.histogram:
            bar = "#" * -(-count * _BAR // most)
            lines.append(f"  up to {top:>7,}  {bar:<{_BAR}}  {count:,}")
        if self.reasoning:
            lines.append(f"with reasoning: {self.reasoning:.0%} of rows")
        if self.languages:
            lines.append("languages: " + ", ".join(f"{name} {part:.0%}" for name, part in self.languages.items()))
        if self.repeated:
            lines.append(f"{self.repeated:,} rows repeat an earlier one")
        return [*lines, *self.notes]


def describe(rows: Sequence[Row], encoding: Encoding | None = None) -> Statistics:
    """Measure rows and, where they were encoded, what they became."""
    encoding = encoding or Encoding([])
    sizes = np.fromiter((len(document) for document in encoding.documents), np.int64, len(encoding.documents))
    quantiles, histogram = {}, []
    if len(sizes):
        values = np.percentile(sizes, _PERCENTILES, method="nearest")
        quantiles = {p: int(value) for p, value in zip(_PERCENTILES, values, strict=True)}
        # Bin b holds lengths above 2**(b - 1), up to 2**b.
        bins = np.ceil(np.log2(np.maximum(1, sizes))).astype(int)
        counts = np.bincount(bins)
        histogram = [(2**b, int(counts[b])) for b in range(int(bins.min()), len(counts))]
    thinking = sum(_reasons(row) for row in rows)
    return Statistics(
        rows=len(rows),
        documents=len(sizes),
        tokens=int(sizes.sum()),
        counted=encoding.counted,
        longest=int(sizes.max(initial=0)),
        quantiles=quantiles,
        histogram=histogram,
        reasoning=thinking / max(1, len(rows)),
        languages=_languages(rows),
        repeated=len(deduplicate(rows, normalised=True)[1]),
        notes=tuple(encoding.lines()),
    )


def language_of(text: str) -> str:
    """Return the language of a text, or its script where that is all there is to see; "other" where neither is clear.

    By the script most letters are of and, for Latin ones, by the commonest words of seven languages: enough to notice
    a dataset that is not what it should be, and no more.
    """
    text = text[:_CHARACTERS]
    letters = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    latin = len(_LATIN.findall(text))
    if not latin and not any(letters.values()):
        return "other"
    name = max(letters, key=lambda name: letters[name])
    # A Chinese or Japanese character says what some letters say.
    dense = 3 if name in ("Chinese", "Japanese", "Korean") else 1
    if letters[name] * dense > latin:
        # Japanese writes most nouns in Chinese characters, and Chinese has no kana.
        return "Japanese" if letters["Japanese"] * 10 > letters["Chinese"] and letters["Japanese"] else name
    words = re.findall(r"[^\W\d_]+", text.casefold())
    votes = {language: sum(word in stops for word in words) for language, stops in _STOPS.items()}
    best = max(votes, key=lambda language: votes[language])
    return best if votes[best] and votes[best] * 20 >= len(words) else "other"


def _languages(rows: Sequence[Row]) -> dict[str, float]:
    looked_at = rows[:: max(1, len(rows) // _LOOKED_AT)]
    counts = Counter(language_of(_said(row)) for row in looked_at)
    return {name: count / len(looked_at) for name, count in counts.most_common()}


def _said(row: Row) -> str:
    """A row's text without its system turn, which is often English before another language."""
    if row.messages is None:
        return content_text(row)
    return "\n".join(m["content"][: _CHARACTERS // 2] for m in row.messages if m["role"] != "system")


def _reasons(row: Row) -> bool:
    turns = [
        *(row.messages or ()),
        *(row.columns.get("chosen") or () if isinstance(row.columns.get("chosen"), list) else ()),
    ]
    return any(turn["role"] == "assistant" and turn["content"].startswith(THINK) for turn in turns)
