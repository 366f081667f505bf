"""What the user's text says beyond itself: `@file` and `/command`."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

_MENTION = re.compile(r"""(?:^|(?<=[\s(\[{<'"`,;:=]))@(?:"(?P<quoted>(?:[^"\\]|\\.)*)|(?P<plain>[^\s"]*))$""")
_COMMAND = re.compile(r"/(?P<name>[^\s/]\S*)?(?:\s+(?P<argument>.*))?", re.DOTALL)
_PLAIN = re.compile(r"[^\s\"\\]+")


@dataclass(frozen=True)
class Mention:
    """A file that is being named: its `@` stands at `begin` of the line, and `query` has been typed of it."""

    begin: int
    query: str


def mention_at(before: str) -> Mention | None:
    """Return the mention that the cursor stands in; `before` is its line up to it.

    An `@` within a word, as in an e-mail address, begins none.
    """
    match = _MENTION.search(before)
    if match is None:
        return None
    quoted = match["quoted"]
    return Mention(match.start(), match["plain"] if quoted is None else re.sub(r"\\(.)", r"\1", quoted))


def mention(name: str) -> str:
    """Return what stands in the text for a file: `@name`, or `@"a name"` where it has spaces."""
    if _PLAIN.fullmatch(name):
        return f"@{name}"
    return '@"' + re.sub(r'(["\\])', r"\\\1", name) + '"'


@dataclass(frozen=True)
class Given:
    """A command as it was typed; `name` is without the slash, `argument` None before there is a space."""

    name: str
    argument: str | None


@dataclass(frozen=True)
class Command:
    """A command of the chat: `/name argument`."""

    name: str
    help: str
    argument: str = ""
    """What the argument is, as in "DIR|off"; empty where there is none."""
    complete: Callable[[str], Sequence[str] | Awaitable[Sequence[str]]] | None = None
    """Gives the arguments there are for what has been typed; what takes long is a coroutine function."""


def command_in(text: str) -> Given | None:
    """Return the command that a text is, None where it is one to send: no slash in front, or two."""
    match = _COMMAND.fullmatch(text)
    return Given(match["name"] or "", match["argument"]) if match else None


def plain(text: str) -> str:
    """Return what is sent of a text that is no command: one slash for the two that said so."""
    return text[1:] if text.startswith("//") else text


def nearest(name: str, names: list[str]) -> str | None:
    """Return the name that was probably meant."""
    close = get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    return close[0] if close else next((each for each in names if name and each.startswith(name[:2].lower())), None)
