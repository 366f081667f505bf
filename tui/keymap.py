"""The chat's keys: each command has a name, and the user's keys.toml gives it other keys.

    new = "ctrl+n"                       # one key
    newline = ["ctrl+j", "alt+enter"]    # several

What is wrong in the file is said with its line, and the rest of it applies. Keys are written as Textual has them: a
character or a name such as "f5", "pageup" or "enter", with "ctrl+", "alt+", "shift+" or "super+" before it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.binding import Binding
from textual.keys import Keys, _character_to_key, format_key, key_to_character

from edger1.tui.user_files import line_of, read_table

if TYPE_CHECKING:
    from textual.app import App

EVERYWHERE = "everywhere"
CHAT = "chat"
ENGINE = "engine"


@dataclass(frozen=True)
class Command:
    """Something that keys do. `where` is the screen on which they do it; commands of one screen share no key."""

    id: str
    keys: tuple[str, ...]
    what: str
    where: str = CHAT


COMMANDS = (
    Command("send", ("enter",), "Send the message"),
    Command("newline", ("shift+enter", "ctrl+j", "alt+enter"), "Begin a new line"),
    Command("stop", ("escape",), "Stop; what is said stays"),
    Command("regenerate", ("f7",), "Ask for another answer"),
    Command("continue", ("ctrl+g",), "Go on with the last answer"),
    Command("edit", ("f5",), "Edit the last message"),
    Command("previous_branch", ("alt+left",), "Show the version before"),
    Command("next_branch", ("alt+right",), "Show the version after"),
    Command("copy_answer", ("f9",), "Copy the last answer"),
    Command("thoughts", ("ctrl+t",), "Fold or unfold the reasoning"),
    Command("think", ("alt+t",), "Think first: auto, on, off"),
    Command("budget", ("alt+b",), "Most tokens of thought: no limit, 500, 2,000, 8,000"),
    Command("messages", ("shift+tab", "ctrl+up"), "To the messages"),
    Command("scroll_up", ("pageup",), "Scroll the conversation up"),
    Command("scroll_down", ("pagedown",), "Scroll the conversation down"),
    Command("new", ("ctrl+n",), "New conversation"),
    Command("conversations", ("ctrl+o",), "Conversations"),
    Command("models", ("f2",), "Models and adapters"),
    Command("settings", ("f3",), "System prompt and sampling"),
    Command("engine", ("f4",), "What the engine does"),
    Command("tools", ("f6",), "Tools that the model may ask for"),
    Command("theme", ("f8",), "Theme"),
    Command("copy_or_quit", ("ctrl+c",), "Copy the selection, else quit"),
    Command("help", ("f1",), "The keys", EVERYWHERE),
    Command("palette", ("ctrl+p",), "All commands", EVERYWHERE),
    Command("quit", ("ctrl+q",), "Quit", EVERYWHERE),
    Command("engine_view", ("tab", "v"), "Over time, or by expert", ENGINE),
    Command("engine_first", ("home",), "To the beginning", ENGINE),
    Command("engine_last", ("end",), "To the latest", ENGINE),
    Command("engine_close", ("escape", "q"), "Back to the conversation", ENGINE),
)

_ALIASES = {
    "control": "ctrl", "ctl": "ctrl", "option": "alt", "opt": "alt", "meta": "alt", "cmd": "super", "command": "super",
    "esc": "escape", "return": "enter", "pgup": "pageup", "pgdn": "pagedown", "pgdown": "pagedown", "del": "delete",
    "ins": "insert", "spacebar": "space", "page_up": "pageup", "page_down": "pagedown",
}  # fmt: skip
_MODIFIERS = ("alt", "ctrl", "hyper", "shift", "super")
_SHOWN = {"pageup": "Page Up", "pagedown": "Page Down", "escape": "Esc", "delete": "Del", "insert": "Ins"}


@dataclass(frozen=True)
class Keymap:
    """Which keys do what, and what was wrong in the user's file, a sentence each."""

    keys: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {each.id: each.keys for each in COMMANDS})
    problems: tuple[str, ...] = ()
    commands: tuple[Command, ...] = COMMANDS

    def of(self, command: str) -> tuple[str, ...]:
        """Return a command's keys, as Textual writes them. Raises KeyError."""
        return self.keys[command]

    def shown(self, command: str) -> str:
        """Return a command's keys as people read them: "Shift+Enter, Ctrl+J"."""
        return ", ".join(shown(key) for key in self.keys[command])

    def overrides(self) -> dict[str, str]:
        """Return what `App.set_keymap` takes: the commands whose keys are not the usual ones."""
        usual = {each.id: each.keys for each in self.commands}
        return {id_: ",".join(keys) for id_, keys in self.keys.items() if keys != usual[id_]}


def binding(command: str, action: str, description: str = "", **more: Any) -> Binding:
    """Return a Textual binding of a command of `COMMANDS` under its usual keys, which the user's keymap replaces.

    Raises KeyError for a command that is not there.
    """
    keys = {each.id: each.keys for each in COMMANDS}[command]
    return Binding(",".join(keys), action, description, id=command, **more)


def keys_of(app: App[Any], command: str) -> tuple[str, ...]:
    """Return the keys that a command of `COMMANDS` has in an app: those of its user, or else the usual ones."""
    moved = app._keymap.get(command)
    return tuple(moved.split(",")) if moved else next(each.keys for each in COMMANDS if each.id == command)


def read_keymap(path: Path, commands: Sequence[Command] = COMMANDS) -> Keymap:
    """Read the user's keys; a file that is not there changes none. Raises nothing: see `Keymap.problems`."""
    table, text, problems = read_table(path)
    if problems and text:
        table, problems = _line_by_line(path, text)
    wanted: dict[str, tuple[str, ...]] = {}
    by_id = {each.id: each for each in commands}
    for id_, value in table.items():
        try:
            wanted[id_] = _keys(by_id, id_, value)
        except ValueError as error:
            problems.append(f"{_at(path, text, id_)}: {error}")
    keys = {each.id: each.keys for each in commands}
    while clash := _clash(by_id, keys | wanted, wanted, text):
        loser, key, other = clash
        problems.append(
            f"{_at(path, text, loser)}: {shown(key)} is taken by {other}, so {loser} keeps "
            f"{' and '.join(shown(each) for each in keys[loser])}. Give {other} another key as well."
        )
        del wanted[loser]
    return Keymap(keys | wanted, tuple(problems), tuple(commands))


def parse_key(written: str) -> str:
    """Return a key as Textual names it. Raises ValueError that says what is wrong with it."""
    text = written.strip()
    if len(text) == 1:
        return _named(text)
    parts = [*text[:-2].split("+"), "+"] if text.endswith("++") else text.split("+")
    *modifiers, last = (part.strip() for part in parts)
    modifiers = [_ALIASES.get(each.lower(), each.lower()) for each in modifiers]
    if unknown := [each for each in modifiers if each not in _MODIFIERS]:
        raise ValueError(f"{written!r} is no key: {unknown[0]!r} is none of {', '.join(_MODIFIERS)}")
    name = _named(last) if len(last) == 1 else _ALIASES.get(last.lower(), last.lower())
    if len(name) == 1 and modifiers:
        name = name.lower()
    if len(last) != 1 and name not in _names() and key_to_character(name) is None:
        near = get_close_matches(name, _names(), n=1)
        raise ValueError(f"{written!r} is no key" + (f"; did you mean {near[0]!r}?" if near else ""))
    return "+".join((*sorted(set(modifiers)), name))


def shown(key: str) -> str:
    """Return a key as people read it: "Ctrl+T", "Page Up", "?"."""
    *modifiers, name = key.split("+")
    character = format_key(name) if len(name) > 1 and name not in _names() else None
    last = character or _SHOWN.get(name) or (name.upper() if modifiers and len(name) == 1 else name)
    return "+".join((*(each.title() for each in modifiers), last.title() if len(last) > 1 else last))


@cache
def _names() -> frozenset[str]:
    """Names of keys that are no characters."""
    named = {key.value.rpartition("+")[2] for key in Keys if not key.value.startswith("<")}
    return frozenset(name for name in named if len(name) > 1) | {"space"}


def _named(character: str) -> str:
    return str(_character_to_key(character))


def _types(key: str) -> bool:
    """Whether a key alone writes something into a text box."""
    return "+" not in key and (key not in _names() or key == "space")


def _keys(by_id: Mapping[str, Command], id_: str, value: Any) -> tuple[str, ...]:
    if id_ not in by_id:
        near = get_close_matches(id_, by_id, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Commands: {', '.join(by_id)}."
        raise ValueError(f"there is no command {id_!r}. {hint}")
    written = [value] if isinstance(value, str) else value
    if not isinstance(written, list) or not written or not all(isinstance(each, str) for each in written):
        raise ValueError(f'{id_} is {value!r}, but a key such as "ctrl+n", or a list of keys, was expected.')
    keys = []
    for each in written:
        # "a,b" would be two keys to Textual.
        key = parse_key(each)
        if by_id[id_].where != ENGINE and _types(key):
            raise ValueError(f"{each!r} types a character, so {id_} could never be reached in the text box.")
        keys.append(key)
    return tuple(dict.fromkeys(keys))


def _clash(
    by_id: Mapping[str, Command], keys: Mapping[str, tuple[str, ...]], wanted: Mapping[str, Any], text: str
) -> tuple[str, str, str] | None:
    """Return (command that must give way, key, command that has it), the last line of the file giving way first."""
    for loser in sorted(wanted, key=lambda id_: line_of(text, id_) or 0, reverse=True):
        for other, theirs in keys.items():
            places = {by_id[loser].where, by_id[other].where}
            together = len(places) == 1 or EVERYWHERE in places
            both = [key for key in keys[loser] if key in theirs]
            if other != loser and together and both:
                return loser, both[0], other
    return None


def _line_by_line(path: Path, text: str) -> tuple[dict[str, Any], list[str]]:
    """Read what can be read of a file that is not valid as a whole: its entries are a line each."""
    table: dict[str, Any] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            for id_, value in tomllib.loads(line).items():
                if id_ in table:
                    raise ValueError(f"{id_} is set a second time")
                table[id_] = value
        except ValueError as error:
            said = str(error).split(" (at")[0]
            problems.append(f"{path}:{number} cannot be read: {said[:1].lower()}{said[1:]}.")
    return table, problems


def _at(path: Path, text: str, id_: str) -> str:
    line = line_of(text, id_)
    return str(path) if line is None else f"{path}:{line}"
