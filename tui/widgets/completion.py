"""The commands, while the text begins with a slash."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from textual import events
from textual.content import Content

from edger1.tui.clean import clean
from edger1.tui.fuzzy import positions, rank
from edger1.tui.mentions import Command, Given, command_in
from edger1.tui.widgets.popup import ROWS_MAX, Popup
from edger1.tui.widgets.prompt import Prompt, unknown


def marked(text: str, query: str) -> Content:
    """Return a text with the letters of the query underlined."""
    content = Content(clean(text))
    if len(content) == len(text):
        for place in positions(query, text):
            content = content.stylize("underline $text-primary", place, place + 1)
    return content


class Completion(Popup):
    """Lists commands, then their arguments. Tab completes, Enter completes and runs what needs nothing more."""

    def __init__(self, prompt: Prompt) -> None:
        super().__init__(prompt)
        self._left: str | None = None
        self._moved = False

    def follow(self) -> None:
        """Show what fits the text."""
        text = self.prompt.text if self.prompt.document[0].startswith("/") else ""
        given = command_in(text) if self.prompt.commands else None
        if given is None or "\n" in text or text == self._left:
            self._left = self._left if text == self._left else None
            self.hide()
            return
        self._left = None
        self._moved = False
        if given.argument is None:
            self._show_commands(given.name)
        else:
            self._show_arguments(given)

    def _show_commands(self, name: str) -> None:
        commands = self.prompt.commands
        found = [commands[index] for index in rank(name, [command.name for command in commands], ROWS_MAX)]
        if not found:
            self.say(unknown(name, [command.name for command in commands]), "Commands")
            return
        wide = max(len(f"{command.name} {command.argument}") for command in found) + 3
        rows = []
        for command in found:
            gap = " " * (wide - len(f"{command.name} {command.argument}"))
            row = Content.assemble("/", marked(command.name, name), " ", command.argument, gap, (command.help, "dim"))
            rows.append((row, command))
        self.show(rows, "Commands", "tab complete · ⏎ run · esc leave")

    def _show_arguments(self, given: Given) -> None:
        command = self._command(given.name)
        if command is None:
            self.say(unknown(given.name, [each.name for each in self.prompt.commands]), "Commands")
        elif command.complete is None:
            if given.argument or not command.argument:
                self.hide()
            else:
                self.say(f"/{command.name} {command.argument}: {command.help}", "Argument")
        else:
            found = command.complete(given.argument or "")
            if inspect.isawaitable(found):
                self.hide()
                self.run_worker(
                    self._wait(given, command, found), group="complete", exclusive=True, exit_on_error=False
                )
            else:
                self._show_found(given, command, found)

    async def _wait(self, given: Given, command: Command, found: object) -> None:
        arguments = await found  # type: ignore[misc]
        if command_in(self.prompt.text) == given:
            self._show_found(given, command, arguments)

    def _show_found(self, given: Given, command: Command, arguments: Sequence[str]) -> None:
        typed = given.argument or ""
        found = [arguments[index] for index in rank(typed, arguments, ROWS_MAX)]
        if found and found != [typed]:
            rows = [(marked(argument, typed), argument) for argument in found]
            self.show(rows, f"/{command.name} {command.argument}", "tab complete · esc leave")
        else:
            self.hide()

    def _command(self, name: str) -> Command | None:
        return next((command for command in self.prompt.commands if command.name == name), None)

    def take_key(self, event: events.Key) -> bool:
        """Enter runs what has been typed, unless another row was chosen or the name is not whole."""
        if event.key in ("up", "down", "pageup", "pagedown"):
            self._moved = True
        typed = command_in(self.prompt.text)
        if event.key == "enter" and typed is not None and not self._moved:
            whole = self._command(typed.name) is not None
            if whole or typed.argument is not None:
                self.hide()
                return False
        return super().take_key(event)

    def take(self, key: str) -> None:
        """Complete; run a command that takes no argument, and an argument that was chosen with Enter."""
        chosen = self.chosen
        if isinstance(chosen, Command):
            self.prompt.replace_all(f"/{chosen.name} " if chosen.argument else f"/{chosen.name}")
            runs = key != "tab" and not chosen.argument
        else:
            given = command_in(self.prompt.text)
            self.prompt.replace_all(f"/{given.name if given else ''} {chosen}")
            runs = key == "enter"
        self.hide()
        if runs:
            self.prompt.action_send()
        elif not isinstance(chosen, Command):
            self._left = self.prompt.text

    def leave(self) -> None:
        """Stay away until the text is another."""
        self._left = self.prompt.text
        self.hide()
