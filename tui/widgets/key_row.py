"""The row of keys at the foot of a screen."""

from __future__ import annotations

from textual.widgets import Footer


class KeyRow(Footer):
    """Textual's footer, made anew only where it would show other keys.

    Textual remakes it, a widget for each key, whenever the focus moves and whenever bindings may have changed: three
    times as the chat starts, which took a fifth of the start.
    """

    def __init__(self) -> None:
        super().__init__(show_command_palette=False, compact=True)
        self._made: tuple[tuple[str, str, str, bool, str], ...] = ()

    async def recompose(self) -> None:
        """Make the row anew if a key, its words or whether it can be pressed has changed."""
        if not self.is_attached:
            # Asked for on a screen that was left meanwhile.
            return
        wanted = tuple(
            (self.app.get_key_display(key), key.description, key.action, enabled, tooltip)
            for _, key, enabled, tooltip in self.screen.active_bindings.values()
            if key.show
        )
        if wanted != self._made:
            self._made = wanted
            await super().recompose()
