"""Conversations as tokens to learn from: the model's own template, with the reasoning kept in the target."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edger1.train.datasets.rows import BadRow, Row


@dataclass(frozen=True)
class Encoded:
    """A document: its tokens, and which of them are learned."""

    ids: np.ndarray
    """int32 [tokens]."""
    counted: np.ndarray
    """bool [tokens]."""
    cut: int
    """How many tokens of the answer (or text) were cut off its end, or of the prompt off its beginning."""
    where: str


@dataclass(frozen=True)
class Encoding:
    """The documents of a dataset, and what became of rows that are not among them, or not whole."""

    documents: list[Encoded]
    dropped: list[BadRow] = field(default_factory=list)
    """Rows that give nothing to learn: a prompt too long, no assistant turn."""
    answers_cut: int = 0
    prompts_cut: int = 0


class Template:
    """Renders and encodes rows for one tokenizer (mlx-lm's wrapper or one of transformers).

    `length` is how many tokens a document may have. `reasoning` "all" keeps the thoughts of every assistant turn, "last"
    those of the last turn alone; earlier turns then look as at inference, and those that lost a thought are not
    learned. `cut_prompt` shortens a prompt that is too long from the left, after the system turn, instead of dropping
    the row.
    """

    def __init__(self, tokenizer: Any, length: int, *, reasoning: str = "all", cut_prompt: bool = False) -> None:
        raise NotImplementedError

    def encode(self, row: Row) -> Encoded:
        """Encode one row. Raises FormatError where it gives nothing to learn, with `where` and why."""
        raise NotImplementedError

    def encode_all(self, rows: Iterable[Row]) -> Encoding:
        """Encode all rows, in batches.

        Raises FormatError where no row gives anything to learn.
        """
        raise NotImplementedError

    def prompt(self, messages: list[dict[str, Any]]) -> np.ndarray:
        """Return int32 ids of the prompt that the model gets at inference for these turns."""
        raise NotImplementedError
