"""Preference pairs as tokens: what is learned of each half, which pairs are refused, and pairs packed into rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edger1.errors import FormatError
from edger1.train.datasets.rows import BadRow, Row
from edger1.train.datasets.template import Encoded, Template
from edger1.train.finetune.method import Batch


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the first preferred. In each, only tokens of the answer are counted."""

    chosen: Encoded
    rejected: Encoded

    @property
    def tokens(self) -> int:
        """Tokens of both halves."""
        return len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def digest(self) -> str:
        """What tells the pair from others: its tokens and which of them count."""
        found = hashlib.sha256()
        for half in (self.chosen, self.rejected):
            for array in (half.ids.astype(np.int32), half.counted.astype(np.bool_)):
                found.update(len(array).to_bytes(8, "little") + array.tobytes())
        return found.hexdigest()


@dataclass(frozen=True)
class Pairs:
    """Pairs that can be learned from, and what became of the other rows."""

    pairs: list[Pair]
    equal: list[BadRow] = field(default_factory=list)
    """Pairs whose halves are the same, or were after they had been cut."""
    empty: list[BadRow] = field(default_factory=list)
    """Pairs with a half of which nothing is left to learn from."""
    cut: int = 0
    """Pairs of which a half lost tokens."""

    def lines(self) -> list[str]:
        """Return what a plan says about the pairs."""
        said = [f"{len(self.pairs):,} pairs" + (f", {self.cut:,} with a half that was cut" if self.cut else "")]
        for refused, why in ((self.equal, "the same in both halves"), (self.empty, "nothing to learn from in a half")):
            if refused:
                said.append(
                    f"{len(refused):,} pairs refused, {why}; the first: {refused[0].where}: {refused[0].reason}"
                )
        return said


def encode_pairs(rows: Iterable[Row], template: Template) -> Pairs:
    """Encode preference rows: `messages` is the prompt, columns `chosen` and `rejected` are the turns that follow.

    Raises FormatError where no pair is left.
    """
    pairs: list[Pair] = []
    equal: list[BadRow] = []
    empty: list[BadRow] = []
    cut = 0
    for row in rows:
        try:
            pair = Pair(*(_half(row, which, template) for which in ("chosen", "rejected")))
        except FormatError as error:
            empty.append(BadRow(row.where, str(error)))
            continue
        if np.array_equal(pair.chosen.ids, pair.rejected.ids):
            equal.append(BadRow(row.where, "both answers are the same, or differ only in what was cut off"))
            continue
        pairs.append(pair)
        cut += bool(pair.chosen.cut or pair.rejected.cut)
    found = Pairs(pairs, equal, empty, cut)
    if not pairs:
        raise FormatError(f"There is no pair to learn from. {' '.join(found.lines()[1:])}")
    return found


def _half(row: Row, which: str, template: Template) -> Encoded:
    answer = row.columns.get(which)
    if not isinstance(answer, list):
        raise FormatError(f"{row.where} has no {which} answer")
    encoded = template.encode(Row(row.where, [*(row.messages or []), *answer], None, row.columns))
    turns = sum(turn.get("role") == "assistant" for turn in answer)
    counted = last_runs(encoded.counted, turns)
    if not counted.any():
        raise FormatError(f"nothing of the {which} answer is left after cutting")
    return Encoded(encoded.ids, counted, encoded.cut, encoded.where)


def last_runs(counted: np.ndarray, number: int) -> np.ndarray:
    """Return bool [tokens]: `counted` with all but the last `number` unbroken runs switched off."""
    starts = counted & ~np.concatenate([[False], counted[:-1]])
    run = np.cumsum(starts)
    return counted & (run > run[-1] - number) if len(counted) else counted


def pack(
    pairs: Sequence[Pair],
    references: Sequence[tuple[float, float]],
    length: int,
    rows: int,
    *,
    pad: int = 0,
    packed: bool = True,
) -> list[Batch]:
    """Pack pairs into batches of at most `rows` rows; both halves of a pair lie in one row, chosen before rejected.

    A row has at most `length` tokens, or one pair. Without `packed`, each half has a row of its own, beside the other.
    Weights are 1 for counted tokens. `extra["half"]`, int32 [rows, length], says which half of the batch a token is of:
    2 i for the chosen answer of its pair i, 2 i + 1 for the rejected one, -1 for padding. `extra["reference"]`,
    f32 [rows, length], has each half's reference log-probability at its first token; `extra["share"]`, f32 [rows], is
    one over the number of pairs in all batches.
    """
    if not packed:
        fitted = [[2 * i + side] for i in range(len(pairs)) for side in (0, 1)]
        rows = max(2, rows - rows % 2)
    else:
        fitted = [[half for i in row for half in (2 * i, 2 * i + 1)] for row in _fit(pairs, length)]
    share = 1 / max(len(pairs), 1)
    parts = [fitted[first : first + rows] for first in range(0, len(fitted), rows)]
    return [_batch(pairs, references, part, share, pad) for part in parts]


def _fit(pairs: Sequence[Pair], length: int) -> list[list[int]]:
    """Fit pairs into rows, the longest first, each into the first row that has room."""
    fitted: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(pairs)), key=lambda i: (-pairs[i].tokens, i)):
        at = next((row for row, left in enumerate(room) if left >= pairs[i].tokens), None)
        if at is None:
            at = len(fitted)
            fitted.append([])
            room.append(length)
        fitted[at].append(i)
        room[at] -= pairs[i].tokens
    return fitted


def _batch(
    pairs: Sequence[Pair], references: Sequence[tuple[float, float]], rows: list[list[int]], share: float, pad: int
) -> Batch:
    halves = {half: (pairs[half // 2].chosen, pairs[half // 2].rejected)[half % 2] for row in rows for half in row}
    shape = (len(rows), max(sum(len(halves[half].ids) for half in row) for row in rows))
    ids, weights, reference = np.full(shape, pad, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    documents, which = np.full(shape, -1, np.int32), np.full(shape, -1, np.int32)
    number = 0
    for r, row in enumerate(rows):
        at = 0
        for document, half in enumerate(row):
            tokens = halves[half]
            end = at + len(tokens.ids)
            ids[r, at:end], weights[r, at:end] = tokens.ids, tokens.counted
            documents[r, at:end], which[r, at:end] = document, number
            # Nothing comes before a document's first token that could predict it.
            weights[r, at] = 0
            reference[r, at] = references[half // 2][half % 2]
            at, number = end, number + 1
    shares = np.full(len(rows), share, np.float32)
    return Batch(ids, documents, weights, {"half": which, "reference": reference, "share": shares})
