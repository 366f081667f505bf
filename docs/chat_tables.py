"""Writes the tables of keys and commands into docs/chat.md: python docs/chat_tables.py [--check]."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from edger1.tui.commands import DEEDS
from edger1.tui.keymap import CHAT, COMMANDS, ENGINE, EVERYWHERE, Keymap
from edger1.tui.widgets.turn import KEYS

TARGET = Path(__file__).with_name("chat.md")


def keys() -> Iterator[str]:
    """Return the keys of the chat and of the engine's screen, and the names that keys.toml gives them."""
    keymap = Keymap()
    yield from ("| key | what it does | name |", "|---|---|---|")
    for where, place in ((CHAT, ""), (EVERYWHERE, ""), (ENGINE, "engine screen: ")):
        for command in COMMANDS:
            if command.where == where:
                what = place + (command.what[0].lower() + command.what[1:] if place else command.what)
                yield f"| {keymap.shown(command.id)} | {what} | `{command.id}` |"


def commands() -> Iterator[str]:
    """Return what can be typed after a slash."""
    keymap = Keymap()
    yield from ("| command | what it does | key |", "|---|---|---|")
    for deed in DEEDS:
        typed = f"/{deed.name} {deed.takes}".rstrip().replace("|", "\\|")
        yield f"| `{typed}` | {deed.help} | {keymap.shown(deed.binding) if deed.binding else ''} |"


def messages() -> Iterator[str]:
    """Return what a message that has the keyboard can be told to do."""
    yield from ("| key | what it does |", "|---|---|")
    for key, word in KEYS.values():
        yield f"| {key} | {word} |"


TABLES: dict[str, Callable[[], Iterator[str]]] = {"keys": keys, "commands": commands, "messages": messages}


def page(text: str) -> str:
    """Return the page `text` with its tables made anew. Raises ValueError where a table has no place."""
    for name, table in TABLES.items():
        begin, end = f"<!-- docs/chat_tables.py: {name} -->", "<!-- end -->"
        rows = "\n".join(table())
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"{TARGET.name} should have one place for the table of {name}: {begin}")
        text = place.sub(lambda _, made=f"{begin}\n{rows}\n{end}": made, text)  # type: ignore[misc]
    return text


def main() -> None:
    """Write the page, or with --check fail where it is stale."""
    text = TARGET.read_text(encoding="utf-8")
    made = page(text)
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(made, encoding="utf-8")
    elif text != made:
        sys.exit("docs/chat.md is stale; renew it with: python docs/chat_tables.py")


if __name__ == "__main__":
    main()
