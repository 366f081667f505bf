"""Writes the tables of keys and commands into docs/chat.md: python docs/chat_tables.py [--check]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from marked_tables import renewed, write_or_check

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


def main() -> None:
    """Write the page, or with --check fail where it is stale."""
    script = Path(__file__).name
    write_or_check(TARGET, renewed(TARGET.read_text(encoding="utf-8"), script, TABLES), script)


if __name__ == "__main__":
    main()
