"""The chat's commands in Textual's command palette, each with the key that does the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from textual.app import App
from textual.command import CommandList, CommandPalette, DiscoveryHit, Hit, Hits, Provider
from textual.content import Content

from edger1.tui.screens.over import EndsOnce


class PaletteCommand(NamedTuple):
    """One line of the palette."""

    title: str
    help: str
    callback: Callable[[], Any]
    key: str = ""
    """As people read it: "Ctrl+N"; empty where there is none."""


class Palette(EndsOnce, CommandPalette):
    """Textual's palette; where its list has no row at all, there is nothing to move by, and no error."""

    DEFAULT_CSS = """
    Palette > Vertical { min-width: 16; }
    """

    def _gather_commands(self, search_value: str) -> Any:
        # Not for a palette that is about to go.
        return super()._gather_commands(search_value) if self.whole else None

    def _select_or_command(self, *given: Any) -> None:
        # Nor for a second Enter.
        if self.whole:
            super()._select_or_command(*given)

    def _action_command_list(self, action: str) -> None:
        if self.query_one(CommandList).scrollable_content_region:
            super()._action_command_list(action)


def provider_of(commands: Callable[[App[Any]], Sequence[PaletteCommand]]) -> type[Provider]:
    """Return a provider for `App.COMMANDS` that lists what `commands` gives for the app at that moment.

    A search finds a command by its title, by its help and by its key.
    """

    class CommandsProvider(Provider):
        """Lists the chat's commands."""

        async def discover(self) -> Hits:
            """All of them, in the order they are given."""
            for command in commands(self.app):
                shown = _with_key(Content(command.title), command)
                yield DiscoveryHit(shown, command.callback, text=command.title, help=command.help)

        async def search(self, query: str) -> Hits:
            """Those that fit what the user typed, best first."""
            matcher = self.matcher(query)
            for command in commands(self.app):
                by_title = matcher.match(command.title)
                # A hit in the title counts more than one in the explanation.
                score = max(by_title, 0.5 * matcher.match(command.help), 0.9 * _is_key(query, command.key))
                if score > 0:
                    title = matcher.highlight(command.title) if by_title else Content(command.title)
                    shown = _with_key(title, command)
                    yield Hit(score, shown, command.callback, text=command.title, help=command.help)

    return CommandsProvider


def _is_key(query: str, key: str) -> bool:
    typed = query.casefold().replace(" ", "")
    return bool(typed) and any(typed == each.casefold().replace(" ", "") for each in key.split(", "))


def _with_key(title: Content, command: PaletteCommand) -> Content:
    return Content.assemble(title, (f"  {command.key}", "$text-muted not bold")) if command.key else title
