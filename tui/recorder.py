"""Saves a conversation as it is held, without the screen ever waiting for a disk.

Every call returns at once; a thread of its own does the writing, in the order of the calls. What an answer says is
collected for at most `FLUSH_S`, so that a program that is killed loses no more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from edger1.errors import EdgeR1Error
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.tree import Attachment, Node

FLUSH_S = 0.5
"""How long what was said may be in memory alone."""


class Recorder:
    """The store's writing side. `complain` is called in the event loop, once, where writing fails."""

    def __init__(self, store: Store, complain: Callable[[str], None]) -> None:
        self.store = store
        self._complain = complain
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="edger1-store")
        self._pieces: dict[str, tuple[list[str], list[str]]] = {}
        self._flush_due: asyncio.TimerHandle | None = None
        self._failed = False

    def begin(self, conversation: str, **given: Any) -> None:
        """Begin a conversation under an id; `given` is what `Store.create` takes."""
        self._do(self.store.create, id_=conversation, **given)

    def add(self, conversation: str, node: Node) -> None:
        """Add a message. Pieces of it may follow."""
        # As it is now: by the time it is written it may have grown by pieces that are written as such.
        self._do(self.store.add, conversation, replace(node))

    def append(self, node_id: str, text: str = "", thought: str = "") -> None:
        """Add a piece to a message that is being written."""
        texts, thoughts = self._pieces.setdefault(node_id, ([], []))
        texts.append(text)
        thoughts.append(thought)
        if self._flush_due is None:
            self._flush_due = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def finish(self, node: Node) -> None:
        """Write the final state of a message."""
        self._pieces.pop(node.id, None)
        self._do(self.store.finish, replace(node))

    def set_head(self, conversation: str, node_id: str | None) -> None:
        """Note which branch is shown."""
        if node_id is not None:
            self._do(self.store.set_head, conversation, node_id)

    def set_settings(self, conversation: str, settings: Settings) -> None:
        """Note what the conversation is held under."""
        self._do(self.store.set_settings, conversation, settings)

    def set_model(self, conversation: str, model: str, adapter: str | None) -> None:
        """Note who answers."""
        self._do(self.store.set_model, conversation, model, adapter)

    def rename(self, conversation: str, title: str) -> None:
        """Give the conversation a title."""
        self._do(self.store.rename, conversation, title)

    def save_draft(self, conversation: str | None, text: str, attachments: tuple[Attachment, ...]) -> None:
        """Keep what is typed and not sent."""
        self._do(self.store.save_draft, conversation, text, attachments)

    def remember(self, text: str) -> None:
        """Keep what was sent, to be found again in the box's history."""
        self._do(self.store.remember, text)

    async def settled(self) -> None:
        """Return when everything so far is written."""
        self._flush()
        await asyncio.wrap_future(self._writer.submit(lambda: None))

    async def close(self) -> None:
        """Write what is left and close the store."""
        self._flush()
        await asyncio.to_thread(self._writer.shutdown)
        self.store.close()

    def _flush(self) -> None:
        if self._flush_due is not None:
            self._flush_due.cancel()
            self._flush_due = None
        pieces, self._pieces = self._pieces, {}
        for node_id, (texts, thoughts) in pieces.items():
            self._do(self.store.append, node_id, "".join(texts), "".join(thoughts))

    def _do(self, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        if self.store.read_only or self._failed:
            return
        loop = asyncio.get_running_loop()
        # A loop that has ended has no screen to complain on.
        with contextlib.suppress(RuntimeError):
            future = self._writer.submit(write, *arguments, **named)
            future.add_done_callback(lambda done: loop.call_soon_threadsafe(self._check, done))

    def _check(self, done: Future[Any]) -> None:
        error = done.exception()
        if error is None or self._failed:
            return
        # Later writes would tear holes: a message without the one before it.
        self._failed = True
        reason = str(error) if isinstance(error, EdgeR1Error) else f"{type(error).__name__}: {error}"
        self._complain(f"What is said from here on is not saved. {reason}")
