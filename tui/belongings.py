"""What the chat is given to work with, apart from an engine; each may be missing, and the chat does without."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edger1.tui.keymap import Keymap

if TYPE_CHECKING:
    from textual.theme import Theme

    from edger1.tools import Approvals, Toolbox
    from edger1.tui.catalogue import Catalogue
    from edger1.tui.presets import Presets
    from edger1.tui.store import Store


@dataclass(frozen=True)
class Belongings:
    """Conversations, models, tools and the user's own looks and keys."""

    store: Store | None = None
    catalogue: Catalogue | None = None
    toolbox: Toolbox | None = None
    approvals: Approvals | None = None
    presets: Presets | None = None
    themes: tuple[Theme, ...] = ()
    keymap: Keymap = field(default_factory=Keymap)
    memory_bytes: int = 0
    """Of this machine."""
    ceiling_bytes: int | None = None
    """What a model may take of it."""
    thoughts_open: bool = True
    """Whether reasoning is open while it comes."""
    colourless: bool = False
    """Whether no colour may be used."""
    exports: Path = field(default_factory=Path.cwd)
    """Where an export without a folder goes."""
    notices: tuple[str, ...] = ()
    """What was found wrong while these were made ready."""
