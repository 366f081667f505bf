"""Conversations as tokens to learn from: the model's own template, with the reasoning kept in the target.

A conversation becomes one document. What is learned is every assistant turn from where the model would take over at
inference to the token that ends the turn; prompts are token for token what the model gets at inference. What somebody
wrote never becomes a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from edger1.errors import FormatError, UsageError
from edger1.train.datasets.encoder import Encoder, Part, parts_of
from edger1.train.datasets.rendering import Piece, Renderer
from edger1.train.datasets.rows import BadRow, Row

_AT_ONCE = 1024
_KEPT_REASONS = 20


@dataclass(frozen=True)
class Encoded:
    """A document: its tokens, and which of them are learned."""

    ids: np.ndarray
    """int32 [tokens]."""
    counted: np.ndarray
    """bool [tokens]."""
    cut: int
    """How many learned tokens were cut off the end."""
    where: str
    prompt_cut: int = 0
    """How many characters were cut off the prompt's beginning."""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoding:
    """The documents of a dataset, and what became of rows that are not among them, or not whole."""

    documents: list[Encoded]
    dropped: list[BadRow] = field(default_factory=list)
    """Rows that give nothing to learn: a prompt too long, no assistant turn."""
    rows: int = 0
    """How many rows were given."""

    @property
    def answers_cut(self) -> int:
        """Documents whose answer lost its end."""
        return sum(document.cut > 0 for document in self.documents)

    @property
    def prompts_cut(self) -> int:
        """Documents whose prompt lost its beginning."""
        return sum(document.prompt_cut > 0 for document in self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of all documents together."""
        return sum(len(document) for document in self.documents)

    @property
    def counted(self) -> int:
        """Tokens that are learned."""
        return sum(int(document.counted.sum()) for document in self.documents)

    def lines(self) -> list[str]:
        """Return what was cut and dropped, as lines of text; none where nothing was."""
        lines = []
        if self.answers_cut:
            tokens = sum(document.cut for document in self.documents)
            lines.append(f"{self.answers_cut:,} of {self.rows:,} rows lose the end of their answer ({tokens:,} tokens)")
        if self.prompts_cut:
            lines.append(f"{self.prompts_cut:,} of {self.rows:,} rows lose the beginning of their prompt")
        if self.dropped:
            lines.append(f"{len(self.dropped):,} of {self.rows:,} rows are left out; the first:")
            lines += [f"  {bad.where}: {bad.reason}" for bad in self.dropped[:3]]
        return lines


class Template:
    """Renders and encodes rows for one tokenizer (mlx-lm's wrapper or one of transformers).

    `length` is how many tokens a document may have. `reasoning` "all" keeps the thoughts of every assistant turn,
    "last" those of the last turn alone; earlier turns then look as at inference, and those that lost a thought are not
    learned. `cut_prompt` shortens a prompt that is too long from the left, after the system turn, instead of dropping
    the row.

    A tokenizer without a chat template takes plain texts, and rows of one prompt and one answer, which follow each
    other as they are.
    """

    def __init__(self, tokenizer: Any, length: int, *, reasoning: str = "all", cut_prompt: bool = False) -> None:
        if length < 2:
            raise UsageError(f"The length of documents is {length}; expected 2 tokens or more.")
        if reasoning not in ("all", "last"):
            raise UsageError(f'reasoning is "{reasoning}"; expected "all" or "last".')
        self.tokenizer = tokenizer
        self.length = length
        self.cut_prompt = cut_prompt
        self.first, self.ends = _first_token(tokenizer), _end_tokens(tokenizer)
        chat = getattr(tokenizer, "has_chat_template", None)
        chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
        self._renderer = Renderer(tokenizer, reasoning, [text for _, text in self.ends]) if chat else None
        self._encoder = Encoder(tokenizer)

    @property
    def pad(self) -> int:
        """A token to fill rows with; it never counts."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return int(pad) if pad is not None else (self.ends[0][0] if self.ends else 0)

    def pieces(self, row: Row) -> list[Piece]:
        """Return a row as text in pieces, before anything is encoded or cut. Raises FormatError."""
        return self._pieces(row)

    def encode(self, row: Row) -> Encoded:
        """Encode one row, of a text its first piece. Raises FormatError where it gives nothing to learn."""
        done = self._encode_some([row])[0]
        if isinstance(done, BadRow):
            raise FormatError(f"{done.where}: {done.reason}.")
        return done[0]

    def pair(self, row: Row) -> tuple[Row, Row]:
        """Return a preference row as two conversations: with its chosen and with its rejected answer."""
        before = row.messages or []
        rest = {name: value for name, value in row.columns.items() if name not in ("chosen", "rejected")}
        chosen, rejected = (
            Row(row.where, [*before, *row.columns[side]], None, rest) for side in ("chosen", "rejected")
        )
        return chosen, rejected

    def encode_pair(self, row: Row) -> tuple[Encoded, Encoded]:
        """Encode a preference row with its chosen and with its rejected answer. Raises FormatError as `encode`."""
        chosen, rejected = self.pair(row)
        return self.encode(chosen), self.encode(rejected)

    def encode_all(self, rows: Iterable[Row]) -> Encoding:
        """Encode all rows, in batches.

        A text longer than `length` becomes several documents. Raises FormatError where no row gives anything to learn.
        """
        documents: list[Encoded] = []
        dropped: list[BadRow] = []
        count = 0
        for some in _batches(rows):
            count += len(some)
            for done in self._encode_some(some):
                if isinstance(done, BadRow):
                    dropped.append(done)
                else:
                    documents += done
        if not documents:
            first = "".join(f"\n  {bad.where}: {bad.reason}" for bad in dropped[:3])
            raise FormatError(
                f"None of the {count:,} rows gives anything to learn.{' The first:' if first else ''}{first}"
            )
        return Encoding(documents, dropped, count)

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> np.ndarray:
        """Return int32 ids of the prompt that the model gets at inference for these turns."""
        if self._renderer is not None:
            text = self._renderer.prompt(messages, tools)
            return np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int32)
        ids = self._encoder.text("".join(m["content"] for m in messages))
        return ids if self.first is None else np.concatenate([np.array([self.first], np.int32), ids])

    def _pieces(self, row: Row) -> list[Piece]:
        if row.messages is None:
            return [Piece(row.text or "", True, True, 0)]
        if self._renderer is not None:
            return self._renderer.pieces(row.messages, row.columns.get("tools"))
        roles = [message["role"] for message in row.messages]
        if roles not in (["user", "assistant"], ["assistant"]):
            raise FormatError(
                "the model has no chat template, so a row is one prompt and one answer, or a text, and not "
                f"turns of {', '.join(roles)}"
            )
        return [Piece(m["content"], True, m["role"] == "assistant", i) for i, m in enumerate(row.messages)]

    def _encode_some(self, rows: Sequence[Row]) -> list[list[Encoded] | BadRow]:
        done: list[list[Encoded] | BadRow] = []
        pieces: list[list[Piece] | str] = []
        for row in rows:
            try:
                pieces.append(self._pieces(row))
            except FormatError as error:
                pieces.append(str(error))
        good = [parts_of(p) for p in pieces if not isinstance(p, str)]
        encoded = iter(zip(good, self._encoder.encode(good), strict=True))
        for row, rendered in zip(rows, pieces, strict=True):
            if isinstance(rendered, str):
                done.append(BadRow(row.where, rendered))
                continue
            parts, ids = next(encoded)
            if isinstance(ids, str):
                done.append(BadRow(row.where, ids))
            else:
                done.append(self._document(row, rendered, parts, ids))
        return done

    def _document(
        self, row: Row, pieces: list[Piece], parts: list[Part], ids: list[np.ndarray]
    ) -> list[Encoded] | BadRow:
        tokens, counted = self._joined(parts, ids)
        if row.messages is None:
            return self._texts(row, tokens, counted) if len(tokens) else BadRow(row.where, "the text is empty")
        if not counted.any():
            return BadRow(row.where, "no assistant turn has anything to learn")
        whole, prompt_cut = int(counted.sum()), 0
        if len(tokens) > self.length and self.cut_prompt:
            shorter = self._shortened(pieces, len(tokens), int(np.argmax(counted)))
            if shorter is not None:
                tokens, counted, prompt_cut = shorter
        prompt = int(np.argmax(counted))
        if prompt >= self.length:
            return BadRow(
                row.where, f"its prompt has {prompt:,} tokens, which leave nothing of {self.length:,} for the answer"
            )
        counted = counted[: self.length]
        last = len(counted) - int(np.argmax(counted[::-1]))
        return [Encoded(tokens[:last], counted[:last], whole - int(counted.sum()), row.where, prompt_cut)]

    def _joined(self, parts: list[Part], ids: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        marks = [np.full(len(own), part[1]) for part, own in zip(parts, ids, strict=True)]
        if self._renderer is None:
            # What has no template gets the tokens that texts begin and end with.
            if self.first is not None:
                ids, marks = [np.array([self.first], np.int32), *ids], [np.zeros(1, bool), *marks]
            if self.ends:
                ids, marks = [*ids, np.array([self.ends[0][0]], np.int32)], [*marks, np.ones(1, bool)]
        if not ids:
            return np.zeros(0, np.int32), np.zeros(0, bool)
        return np.concatenate(ids).astype(np.int32), np.concatenate(marks)

    def _texts(self, row: Row, tokens: np.ndarray, counted: np.ndarray) -> list[Encoded]:
        if self._renderer is not None:
            first = [] if self.first is None else [self.first]
            last = [self.ends[0][0]] if self.ends else []
            tokens = np.concatenate([np.array(first, np.int32), tokens, np.array(last, np.int32)])
            counted = np.ones(len(tokens), bool)
            counted[: len(first)] = False
        begins = range(0, len(tokens), self.length)
        return [
            Encoded(tokens[b : b + self.length], counted[b : b + self.length], 0, row.where)
            for b in begins
            # A piece of one token has nothing before it to be predicted from.
            if len(tokens) - b > 1 or b == 0
        ]

    def _shortened(self, pieces: list[Piece], tokens: int, prompt: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Take characters off the first turn that is no system turn until the document fits.

        A quarter of `length` is left to the prompt; an answer that does not fit beside it loses its end.
        """
        first_counted = next(i for i, piece in enumerate(pieces) if piece.counted)
        candidates = [i for i in range(first_counted) if pieces[i].content and pieces[i].text]
        if not candidates:
            return None
        # The system turn, where there is one, comes first.
        at = candidates[-1]
        text = pieces[at].text
        target = max(self.length - (tokens - prompt), self.length // 4)
        room, cut = prompt - target, 0
        for _ in range(16):
            if room <= 0:
                break
            left = len(text) - cut
            if left <= 0:
                return None
            size = max(1, len(self._encoder.text(text[cut:])))
            cut += max(1, -(-left * min(room, size) // size))
            kept = [*pieces]
            kept[at] = Piece(text[cut:], True, False, pieces[at].turn)
            parts = parts_of(kept)
            ids = self._encoder.encode([parts])[0]
            if isinstance(ids, str):
                return None
            joined, counted = self._joined(parts, ids)
            room = int(np.argmax(counted)) - target
        return (joined, counted, cut) if cut and room <= 0 else None


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rows = iter(rows)
    while some := list(islice(rows, _AT_ONCE)):
        yield some


def _first_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before a text, if any."""
    ids = list(tokenizer.encode("a"))
    bos = getattr(tokenizer, "bos_token_id", None)
    return int(bos) if bos is not None and ids[:1] == [bos] else None


def _end_tokens(tokenizer: Any) -> list[tuple[int, str]]:
    """The tokens that end an answer, as ids and text, the tokenizer's own first."""
    own = getattr(tokenizer, "eos_token_id", None)
    ids = [own] if own is not None else []
    more = getattr(tokenizer, "eos_token_ids", None)
    # mlx-lm's wrapper has a set, also from the model's config; tokenizers of transformers answer with the one id.
    ids += sorted(set(more) - set(ids)) if isinstance(more, set | list | tuple) else []
    return [(int(i), str(tokenizer.decode([int(i)]))) for i in ids]
