"""Text to tokens for training: the parts of a document, with special tokens only where the template wrote them.

A document is encoded in parts that begin where the model takes over, so that the tokens of a prompt are those of the
prompt alone, whatever the answer begins with.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.train.datasets.rendering import Piece

Part = tuple[list[Piece], bool]
"""Neighbouring pieces that are all learned, or all not."""


def parts_of(pieces: Sequence[Piece]) -> list[Part]:
    """Group pieces by whether they are learned."""
    parts: list[Part] = []
    for piece in pieces:
        if not piece.text:
            continue
        if parts and parts[-1][1] == piece.counted:
            parts[-1][0].append(piece)
        else:
            parts.append(([piece], piece.counted))
    return parts


def text_of(part: Part) -> str:
    """Return a part's text."""
    return "".join(piece.text for piece in part[0])


class Encoder:
    """Encodes parts with a tokenizer of transformers or mlx-lm, with the Rust one behind it where there is one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._joint = self._plain = None
        self._added: dict[str, int] = {}
        if backend is not None and hasattr(backend, "to_str"):
            from tokenizers import Tokenizer

            about = json.loads(backend.to_str())
            about |= {"truncation": None, "padding": None}
            self._joint = Tokenizer.from_str(json.dumps(about))
            self._added = {token.content: i for i, token in self._joint.get_added_tokens_decoder().items()}
            self._plain = Tokenizer.from_str(json.dumps(about | {"added_tokens": [], "post_processor": None}))
        else:
            vocabulary = getattr(tokenizer, "added_tokens_encoder", None) or {}
            self._added = dict(vocabulary)
        self._is_added = np.zeros(max(self._added.values(), default=0) + 1, bool)
        self._is_added[list(self._added.values())] = True
        self._counts: dict[str, int] = {}
        self._prefixes = self._joint is not None and self._begins_with_space()

    def encode(self, documents: Sequence[Sequence[Part]]) -> list[list[np.ndarray] | str]:
        """Return each document's parts as int32 ids, or why it has none."""
        flat = [text_of(part) for parts in documents for part in parts]
        encoded = iter(self._encode(flat))
        done: list[list[np.ndarray] | str] = []
        for parts in documents:
            own = [next(encoded) for _ in parts]
            try:
                if self._prefixes:
                    own = self._joined(parts)
                done.append([self._checked(part, ids) for part, ids in zip(parts, own, strict=True)])
            except FormatError as error:
                done.append(str(error))
        return done

    def text(self, text: str) -> np.ndarray:
        """Return int32 ids of a text in which no special token is meant."""
        piece = Piece(text, True, True, 0)
        return self._checked(([piece], True), self._encode([text])[0])

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        try:
            if self._joint is None:
                return [np.asarray(self._tokenizer.encode(t, add_special_tokens=False), np.int32) for t in texts]
            batch = self._joint.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            # A half character is no text to a tokenizer; one row with it must not cost the others.
            if all(map(_is_text, texts)):
                raise
            return [self._encode([t])[0] if _is_text(t) else np.zeros(0, np.int32) for t in texts]
        return [np.array(encoding.ids, np.int32) for encoding in batch]

    def _begins_with_space(self) -> bool:
        """Whether the tokenizer puts a space before a text, as those of SentencePiece do."""
        assert self._joint is not None
        alone = self._joint.encode("a", add_special_tokens=False).tokens
        return bool(alone) and alone[0].startswith("▁")

    def _joined(self, parts: Sequence[Part]) -> list[np.ndarray]:
        """Encode parts where each must be seen behind those before it, lest it get a space of its own."""
        text, before, own = "", np.zeros(0, np.int32), []
        for part in parts:
            text += text_of(part)
            ids = self._encode([text])[0]
            if len(ids) < len(before) or (ids[: len(before)] != before).any():
                raise FormatError("the tokenizer joins the prompt's end with the answer's beginning")
            own.append(ids[len(before) :])
            before = ids
        return own

    def _checked(self, part: Part, ids: np.ndarray) -> np.ndarray:
        """Return a part's ids, encoded again where what somebody wrote became a special token."""
        if not len(ids) and not _is_text(text_of(part)):
            raise FormatError("its text holds half a character (a lone surrogate)")
        inside = ids[ids < len(self._is_added)]
        if int(self._is_added[inside].sum()) == sum(self._own(p.text) for p in part[0] if not p.content):
            return ids
        return self._apart(part)

    def _own(self, text: str) -> int:
        """How many special tokens the template wrote in a piece of its own."""
        count = self._counts.get(text)
        if count is None:
            ids = self._encode([text])[0]
            count = self._counts[text] = int(self._is_added[ids[ids < len(self._is_added)]].sum())
        return count

    def _apart(self, part: Part) -> np.ndarray:
        """Encode what stands between the template's special tokens without looking for any in it."""
        if self._plain is None:
            raise FormatError("its text holds a special token, which this tokenizer cannot write as plain text")
        runs: list[str | int] = [""]
        for piece in part[0]:
            if piece.content:
                runs[-1] = str(runs[-1]) + piece.text
                continue
            assert self._joint is not None
            encoding, at = self._joint.encode(piece.text, add_special_tokens=False), 0
            for i, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
                if i < len(self._is_added) and self._is_added[i]:
                    runs[-1] = str(runs[-1]) + piece.text[at:begin]
                    runs += [i, ""]
                    at = end
            runs[-1] = str(runs[-1]) + piece.text[at:]
        ids: list[int] = []
        for run in runs:
            if isinstance(run, int):
                ids.append(run)
            elif run:
                plain = self._plain.encode(run, add_special_tokens=False).ids
                if any(i < len(self._is_added) and self._is_added[i] for i in plain):
                    raise FormatError("its text holds a special token, which this tokenizer cannot write as plain text")
                ids += plain
        return np.array(ids, np.int32)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
