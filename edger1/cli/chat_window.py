"""The full-screen chat with all it works with: an engine, conversations, models, tools, looks and keys."""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edger1 import paths
from edger1.config import DEFAULT_MODEL, Config, load_config
from edger1.errors import EdgeR1Error, UsageError

if TYPE_CHECKING:
    from edger1.tui.settings import Settings
    from edger1.tui.store import Store


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; None leaves a choice to the user's config.toml or the program."""

    model: str | None
    settings: Settings | None = None
    memory_bytes: int | None = None
    context: int | None = None
    precision: str = "fast"
    expert_slots: str | None = None
    adapter: str | None = None
    draft: str | None = None
    offline: bool = False
    resume: bool = False
    conversation: str | None = None
    kv_bits: int | None = None


def open_usual() -> bool:
    """Open the chat as `edger1 chat` does with nothing after it; False where there is no full screen for it."""
    from edger1.cli.loading import apply_threads
    from edger1.tui.terminal import in_lines

    config = load_config()
    terminals = (sys.stdin.isatty(), sys.stdout.isatty())
    if not all(terminals) or in_lines(os.environ, *terminals, configured=config.accessible):
        return False
    apply_threads(config.threads)
    open_window(Wanted(None, kv_bits=config.kv_bits), config)
    return True


def open_window(wanted: Wanted, config: Config) -> None:
    """Open the chat and return when the user quits."""
    # Until the screen is there: what is imported and made for it is no garbage, and looking for some took a quarter of
    # the time.
    gc.disable()
    for size in ("COLUMNS", "LINES"):
        # Some shells and programs leave the size that the terminal had when they began; Textual would take that for its
        # size, and draw beyond it or not all of it.
        os.environ.pop(size, None)
    from textual.theme import BUILTIN_THEMES

    from edger1.cli.backend import ChildBackend
    from edger1.cli.catalogue import ModelCatalogue, usual_adapter_folders
    from edger1.cli.loading import ensure_model, note_beyond_training
    from edger1.memory import default_ceiling, machine_bytes
    from edger1.tui import run_chat
    from edger1.tui.belongings import Belongings
    from edger1.tui.keymap import read_keymap
    from edger1.tui.looks import remembered
    from edger1.tui.presets import Presets
    from edger1.tui.store import Store
    from edger1.tui.terminal import colourless, terminfo_colours
    from edger1.tui.themes import COLOURLESS, THEMES
    from edger1.tui.user_themes import read_themes

    offline = wanted.offline or config.offline
    context = wanted.context if wanted.context is not None else config.context
    ceiling = wanted.memory_bytes if wanted.memory_bytes is not None else config.memory_bytes
    asked = wanted.model or config.model
    folder = None if asked is None else ensure_model(asked, offline)
    store = Store.open()
    name = asked
    if folder is None:
        name, folder = _usual(store)
    if folder is not None:
        note_beyond_training(folder, context)
    backend = ChildBackend(
        folder,
        memory=ceiling,
        context=context,
        precision=wanted.precision,
        expert_slots=wanted.expert_slots,
        adapter=None if wanted.adapter is None else _adapter(wanted.adapter),
        kv_bits=wanted.kv_bits,
        draft=None if wanted.draft is None else ensure_model(wanted.draft, offline),
    )
    plain = colourless(os.environ, terminfo_colours())
    keymap = read_keymap(paths.user_keys())
    themes = read_themes(paths.user_themes(), [*BUILTIN_THEMES, *(theme.name for theme in (*THEMES, COLOURLESS))])
    toolbox = approvals = None
    if config.tools.servers or config.tools.functions:
        from edger1.tools import Approvals, Toolbox

        toolbox, approvals = Toolbox(config.tools), Approvals(store)
    belongings = Belongings(
        store=store,
        catalogue=ModelCatalogue(
            memory_bytes=ceiling,
            context=context,
            kv_bits=wanted.kv_bits,
            offline=offline,
            adapter_folders=usual_adapter_folders(config.adapters),
        ),
        toolbox=toolbox,
        approvals=approvals,
        presets=Presets(),
        themes=themes.themes,
        keymap=keymap,
        # Of use only where a model is to be recommended.
        memory_bytes=machine_bytes() if folder is None else 0,
        ceiling_bytes=ceiling or (default_ceiling() if folder is None else None),
        thoughts_open=config.thoughts,
        colourless=plain,
        notices=(*store.notices, *keymap.problems, *themes.problems),
    )
    if plain:
        os.environ["NO_COLOR"] = "1"
    run_chat(
        backend,
        name,
        settings=wanted.settings,
        adapter=wanted.adapter,
        theme=config.theme or remembered(),
        belongings=belongings,
        resume=_conversation(store, wanted),
        on_painted=collect,
    )


def _adapter(folder: str) -> str | None:
    # It brings all of the library with it, which takes a while to import.
    from edger1.model import adapter_folder

    return adapter_folder(folder)


def collect() -> None:
    """Look for garbage from here on, and not among what was made so far: it stays as long as the program."""
    gc.freeze()
    gc.enable()


def _usual(store: Store) -> tuple[str | None, Path | None]:
    """Return the model to begin with where none is named: the last one that is still here, else the usual one."""
    from edger1 import installed

    said = [each.model for each in store.list(limit=20) if each.model]
    for name in dict.fromkeys([*said, DEFAULT_MODEL]):
        try:
            return name, installed.resolve(name)
        except EdgeR1Error:
            continue
    return None, None


def _conversation(store: Store, wanted: Wanted) -> str | None:
    """Return the conversation to go on with. Raises UsageError for one that is not there."""
    if wanted.conversation is not None:
        found = [each.id for each in store.list() if each.id.startswith(wanted.conversation)]
        if len(found) != 1:
            how = "no conversation begins" if not found else f"{len(found)} conversations begin"
            raise UsageError(f'{how} with "{wanted.conversation}". "edger1 chats" lists them.')
        return found[0]
    if wanted.resume:
        latest = store.list(limit=1)
        return latest[0].id if latest else None
    return None
