"""Reads a JSON file one conversation at a time: exports of a gigabyte are common, and one is small."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any

from edger1.errors import FormatError

CHUNK = 1 << 20
LARGEST_CHARACTERS = 64 << 20
"""The longest value that is taken for one conversation."""
LARGEST_BYTES = 8 << 30
"""The longest text that is read; a small archive can unpack to any size."""
_BLANK = " \t\r\n"
_IN_NUMBERS = ("", *"0123456789.eE+-")


class _Text:
    """What was read and not used yet."""

    def __init__(self, file: IO[str], where: str) -> None:
        self.file, self.where = file, where
        self.rest = ""
        self.ended = False
        self.count = 0

    def more(self) -> bool:
        """Read on; False at the end. Reads more the more there is, so that a long value is not scanned too often."""
        piece = self.file.read(max(CHUNK, len(self.rest)))
        self.ended = not piece
        self.rest += piece
        self.count += len(piece)
        if self.count > LARGEST_BYTES:
            raise FormatError(f"{self.where} is larger than {LARGEST_BYTES >> 30} GB; nothing was brought in.")
        return not self.ended

    def next(self) -> str:
        """Return the next character that is not blank without using it, "" at the end."""
        while True:
            self.rest = self.rest.lstrip(_BLANK)
            if self.rest or not self.more():
                return self.rest[:1]

    def take(self) -> Any:
        """Return the next value."""
        decoder = json.JSONDecoder()
        self.next()
        while True:
            try:
                value, end = decoder.raw_decode(self.rest)
                # A number may go on in what was not read yet.
                if self.rest[end : end + 1] not in _IN_NUMBERS or self.ended or not self.more():
                    self.rest = self.rest[end:]
                    return value
            except json.JSONDecodeError as error:
                broken = error.pos < len(self.rest) - 16 and not error.msg.startswith("Unterminated string")
                if broken or self.ended:
                    raise self.wrong(f"at character {self.count - len(self.rest) + error.pos}: {error.msg}") from error
                self.more()
            except RecursionError as error:
                raise self.wrong("it is nested too deeply") from error
            except ValueError as error:
                raise self.wrong(str(error)) from error
            if len(self.rest) > LARGEST_CHARACTERS:
                raise self.wrong(f"one value is longer than {LARGEST_CHARACTERS >> 20} million characters")

    def wrong(self, why: str) -> FormatError:
        return FormatError(f"{self.where} is not the JSON of conversations: {why}. Nothing was brought in.")


def values(file: IO[str], where: str) -> Iterator[Any]:
    """Return the values of a list one by one, or the one value that the file is.

    `where` names the file in errors. Raises FormatError for what is no JSON.
    """
    text = _Text(file, where)
    if text.next() == "\ufeff":
        text.rest = text.rest[1:]
    if text.next() != "[":
        yield text.take()
    else:
        text.rest = text.rest[1:]
        if text.next() == "]":
            text.rest = text.rest[1:]
        else:
            while True:
                yield text.take()
                mark = text.next()
                text.rest = text.rest[1:]
                if mark == "]":
                    break
                if mark != ",":
                    raise text.wrong("the list does not go on and does not end; the file may be cut off")
    if text.next():
        raise text.wrong("something follows its end")
