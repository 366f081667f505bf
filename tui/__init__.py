"""The terminal chat. Installed and imported as `edger1.tui`.

`run_chat` opens it over anything that speaks the `Backend` protocol. Importing this package does not import Textual.
"""

from __future__ import annotations

from edger1.tui.backend import Backend

__all__ = ["Backend", "run_chat"]


def run_chat(backend: Backend, model_name: str, *, system: str | None = None, theme: str | None = None) -> None:
    """Open the chat in this terminal and return when the user quits; the backend is closed then.

    `model_name` is what the user calls the model, `system` the system prompt, `theme` a theme's name (Textual's own and
    "edger1-dark", "edger1-light"). Raises UsageError for an unknown theme.
    """
    from edger1.tui.app import run

    run(backend, model_name, system=system, theme=theme)
