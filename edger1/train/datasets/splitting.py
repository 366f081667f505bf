"""Which rows are for training and which for measuring, by what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edger1.train.datasets.rows import Row


def split(rows: Sequence[Row], share: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Return (training, validation) rows; about `share` of all contents go to validation.

    A row's side depends on its content and the seed alone: it stays when rows are added, taken away or reordered, and
    rows with the same prompt fall on one side.
    """
    raise NotImplementedError


def deduplicate(rows: Sequence[Row], *, normalised: bool = False) -> tuple[list[Row], list[Row]]:
    """Return (rows, dropped): the first of each content, and the rows that repeat one.

    `normalised` compares without case, punctuation and spaces.
    """
    raise NotImplementedError


def decontaminate(rows: Sequence[Row], evaluation: Iterable[Row], *, words: int = 13) -> tuple[list[Row], list[Row]]:
    """Return (rows, dropped): rows whose prompts share no run of `words` words with an evaluation prompt, and the rest.

    Evaluation prompts with fewer words must be contained whole.
    """
    raise NotImplementedError
