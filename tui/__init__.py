"""The terminal chat. Installed and imported as `edger1.tui`.

`run_chat` opens it over anything that speaks the `Backend` protocol. Importing this package does not import Textual.
"""

from __future__ import annotations

import os
from typing import Any

from edger1.tui.backend import Backend

__all__ = ["Backend", "run_chat"]

# Textual draws what a key has changed at its next tick, or the one after where something else was drawn before. With 60
# ticks a second that is most of the time that a key takes. It reads this once, when it is imported.
os.environ.setdefault("TEXTUAL_FPS", "120")


def run_chat(backend: Backend, model_name: str | None, **given: Any) -> None:
    """Open the chat in this terminal and return when the user quits; the backend and the belongings are closed then.

    `model_name` is what the user calls the model, None where one is to be chosen; `given` is what `ChatApp` takes.
    Raises UsageError for an unknown theme.
    """
    from edger1.tui.app import ChatApp, run

    run(ChatApp(backend, model_name, **given), backend)
