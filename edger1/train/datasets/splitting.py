"""Which rows are for training and which for measuring, by what is in them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence

from edger1.errors import UsageError
from edger1.train.datasets.rows import Row

# Marks of prose are left out; signs such as + and * make another question of the same numbers.
_WORD = re.compile(r"""\w+|[^\w\s.,;:!?"'`´“”„‘’«»…。，、！？]""")
# Languages written without spaces have no words to count; their characters are taken one by one.
_UNSPACED = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def prompt_text(row: Row) -> str:
    """Return what a row asks: its turns before the first answer without the system's; of a text, all of it."""
    if row.messages is None:
        return row.text or ""
    asked = []
    for message in row.messages:
        if message["role"] == "assistant":
            break
        if message["role"] != "system":
            asked.append(message["content"])
    return "\n".join(asked) or content_text(row)


def content_text(row: Row) -> str:
    """Return all that a row says, with its roles and, of a preference row, both answers."""
    if row.messages is None:
        return row.text or ""
    turns = [f"{message['role']}: {message['content']}{message.get('tool_calls') or ''}" for message in row.messages]
    for side in ("chosen", "rejected"):
        answer = row.columns.get(side)
        if isinstance(answer, list):
            turns += [f"{side}: {message['content']}" for message in answer if isinstance(message, dict)]
    return "\n".join(turns)


def normalised_text(text: str) -> str:
    """Return a text's words and signs in lower case with single spaces between, without the punctuation of prose."""
    return " ".join(_words(text))


def split(rows: Sequence[Row], share: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return (training, validation) rows; about `share` of all prompts go to validation.

    A row's side depends on its prompt and the seed alone: it stays when rows are added, taken away or reordered, and
    rows with the same prompt, but for case and punctuation, fall on one side. Few rows may all fall on one.

    Raises UsageError for a share that is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UsageError(f"The share of rows for validation is {share:g}; expected 0 or more and less than 1.")
    sides: tuple[list[Row], list[Row]] = ([], [])
    key = str(seed).encode()
    for row in rows:
        text = prompt_text(row)
        digest = _digest(normalised_text(text) or text, key)
        sides[int.from_bytes(digest[:8], "big") < share * 2**64].append(row)
    return sides


def deduplicate(rows: Sequence[Row], *, normalised: bool = False) -> tuple[list[Row], list[Row]]:
    """Return (rows, dropped): the first of each content, and the rows that repeat one.

    `normalised` compares without case, punctuation and spaces.
    """
    seen: set[bytes] = set()
    kept: list[Row] = []
    dropped: list[Row] = []
    for row in rows:
        text = content_text(row)
        digest = _digest((normalised_text(text) or text) if normalised else text)
        (dropped if digest in seen else kept).append(row)
        seen.add(digest)
    return kept, dropped


def decontaminate(rows: Sequence[Row], evaluation: Iterable[Row], *, words: int = 13) -> tuple[list[Row], list[Row]]:
    """Return (rows, dropped): rows whose prompts share no run of `words` words with an evaluation prompt, and the rest.

    An evaluation prompt with fewer words is found where a row's prompt holds it whole. Words are compared without case
    and punctuation. 13 words are what GPT-3's authors took (Brown et al. 2020, appendix C).
    """
    if words < 1:
        raise UsageError(f"Runs of {words} words cannot be compared; expected 1 or more.")
    by_length: dict[int, set[bytes]] = {}
    for row in evaluation:
        own = _words(prompt_text(row))
        size = min(words, len(own))
        if size:
            by_length.setdefault(size, set()).update(_runs(own, size))
    kept: list[Row] = []
    dropped: list[Row] = []
    for row in rows:
        own = _words(prompt_text(row))
        found = any(run in runs for size, runs in by_length.items() for run in _runs(own, size))
        (dropped if found else kept).append(row)
    return kept, dropped


def _words(text: str) -> list[str]:
    return _WORD.findall(_UNSPACED.sub(r" \g<0> ", text.casefold()))


def _runs(words: list[str], size: int) -> Iterator[bytes]:
    for i in range(len(words) - size + 1):
        yield _digest(" ".join(words[i : i + size]))


def _digest(text: str, key: bytes = b"") -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest()
