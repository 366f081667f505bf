"""One conversation that is held: its messages, its name, what it is held under, and its record as it grows."""

from __future__ import annotations

from edger1.tui.recorder import Recorder
from edger1.tui.settings import Settings
from edger1.tui.store import Stored
from edger1.tui.tree import Node, Tree, new_id


class Talk:
    """A conversation in memory that is written down as it changes. It is begun in the store with its first message."""

    def __init__(self, recorder: Recorder | None, settings: Settings, stored: Stored | None = None) -> None:
        self._recorder = recorder
        self.settings = settings if stored is None else stored.settings
        self.tree = Tree() if stored is None else stored.tree
        self.id = None if stored is None else stored.id
        self.title = None if stored is None else stored.title

    def add(self, node: Node, model: str | None, adapter: str | None, *, shown: bool = True) -> Node:
        """Add a message, and show it; `model` and `adapter` are those of the conversation that begins with it."""
        head = self.tree.head
        self.tree.add(node)
        if not shown:
            self.tree.head = head
        if self._recorder is not None:
            if self.id is None:
                self.id = new_id()
                self._recorder.begin(self.id, model=model, adapter=adapter, settings=self.settings, title=self.title)
            self._recorder.add(self.id, node)
            if shown:
                self._recorder.set_head(self.id, node.id)
        return node

    def grow(self, node: Node, text: str = "", thought: str = "") -> None:
        """Add a piece to a message."""
        node.text += text
        node.thought += thought
        if self._recorder is not None:
            self._recorder.append(node.id, text, thought)

    def finish(self, node: Node) -> None:
        """Note that a message is as it will be."""
        if self._recorder is not None:
            self._recorder.finish(node)

    def show(self, head: str | None) -> None:
        """Make a message the last one that is shown; None: nothing is."""
        self.tree.head = head
        self._note_head()

    def switch(self, node_id: str, step: int) -> bool:
        """Show another alternative to a message; False where there is none."""
        changed = self.tree.switch(node_id, step)
        if changed:
            self._note_head()
        return changed

    def rename(self, title: str) -> None:
        """Give it a title."""
        self.title = title
        if self._recorder is not None and self.id is not None:
            self._recorder.rename(self.id, title)

    def change(self, settings: Settings) -> None:
        """Hold what follows under other settings."""
        self.settings = settings
        if self._recorder is not None and self.id is not None:
            self._recorder.set_settings(self.id, settings)

    def use(self, model: str, adapter: str | None) -> None:
        """Note who answers from here on."""
        if self._recorder is not None and self.id is not None:
            self._recorder.set_model(self.id, model, adapter)

    def _note_head(self) -> None:
        if self._recorder is not None and self.id is not None:
            self._recorder.set_head(self.id, self.tree.head)
