"""The conversations of every window, in one SQLite file (https://sqlite.org/wal.html).

What is written is safe from the end of this process as soon as the call returns; from a power failure, up to the last
checkpoint. An answer that is being written is kept as pieces, one row each, until `finish` puts its final text in
their place; where the program died before that, the pieces are what was said. Another window may read and write at any
time: each change is a short transaction, begun with the write lock, so that it waits instead of failing.
"""

from __future__ import annotations

import builtins
import contextlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.errors import StoreError
from edger1.tui.settings import Settings
from edger1.tui.store import fields, index, rows, search
from edger1.tui.store.opening import Lane, Opened, explained, open_database
from edger1.tui.store.records import Hit, Stored, Summary
from edger1.tui.tree import Attachment, Node, new_id

KEPT_DELETED_S = 30 * 86400.0
"""How long a deleted conversation can be had back."""
STALE_S = 600.0
"""An answer that has been begun this long ago is folded when a store is opened; doing it to a live one does no harm."""
KEPT_TYPED = 2000
MERGED_AT_ONCE = 50
_TITLE_LENGTH = 200


class Store:
    """Conversations, drafts, what was typed and what was approved. Every method may be called from any thread.

    All of them raise StoreError where the disk or the file fails; the message says what to do.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.notices = list(opened.notices)
        """What was found when the file was opened, and what was done about it, in sentences for the user."""
        self.read_only = opened.read_only
        """Whether nothing can be saved, because a newer EdgeR1 wrote the file."""
        self.in_memory = opened.in_memory
        """Whether what is saved is gone after quitting, because the file cannot be written."""

    @classmethod
    def open(cls, path: Path | None = None) -> Store:
        """Open the file at `path`, by default in the data folder. Whatever is found there, a store comes of it."""
        store = cls(open_database(path or paths.data() / "conversations.db"))
        if not store.read_only:
            # Housekeeping must not stand between the user and the conversations.
            with contextlib.suppress(StoreError):
                store._purge()
                store._fold_stale()
        return store

    def close(self) -> None:
        """Close the file; the store cannot be used after it."""
        lanes = {id(lane): lane for lane in (self._opened.searching, self._opened.reading, self._opened.writing)}
        for lane in lanes.values():
            with lane.lock, contextlib.suppress(sqlite3.Error):
                lane.connection.close()

    # One conversation

    def create(
        self,
        *,
        model: str | None,
        adapter: str | None = None,
        settings: Settings,
        title: str | None = None,
        id_: str | None = None,
    ) -> str:
        """Begin a conversation, under an id of `tree.new_id` if one is given, and return its id."""
        id_, moment = id_ or new_id(), time.time()
        with self._writing() as connection:
            self._create(connection, Stored(id_, title, rows.to_tree((), None), settings, model, adapter), moment)
        return id_

    def add(self, conversation: str, node: Node) -> None:
        """Add a message below its parent and make it the head, as `Tree.add` does."""
        with self._writing() as connection:
            seq = self._seq(connection, conversation)
            self._insert(connection, seq, node)
            connection.execute(
                "update conversations set head = ?, updated_at = ?, deleted_at = null where seq = ?",
                (node.id, time.time(), seq),
            )

    def append(self, node_id: str, text: str = "", thought: str = "") -> None:
        """Add a piece to a message that is being written; it is safe when this returns."""
        if not (text or thought):
            return
        with self._writing() as connection:
            added = connection.execute(
                "insert into pieces (message, text, thought) select seq, ?, ? from messages where id = ?",
                (rows.storable(text), rows.storable(thought), node_id),
            )
            if added.rowcount != 1:
                raise StoreError("A piece of an answer belongs to no saved message; save the message first.")

    def finish(self, node: Node) -> None:
        """Put the final state of a message in the place of what was added and appended."""
        with self._writing() as connection:
            conversation = self._finish(connection, node)
            connection.execute("update conversations set updated_at = ? where seq = ?", (time.time(), conversation))

    def set_head(self, conversation: str, node_id: str | None) -> None:
        """Remember which branch is shown."""
        self._set(conversation, head=node_id)

    def set_settings(self, conversation: str, settings: Settings) -> None:
        """Change what the conversation is held under."""
        self._set(conversation, settings=rows.storable(rows.dumped(settings.to_json())))

    def set_model(self, conversation: str, model: str | None, adapter: str | None) -> None:
        """Change whom the conversation is held with."""
        self._set(conversation, model=rows.optional(model), adapter=rows.optional(adapter))

    def pin(self, conversation: str, pinned: bool) -> None:
        """Keep a conversation on top of the list, or no longer."""
        self._set(conversation, pinned=int(pinned))

    def delete(self, conversation: str) -> None:
        """Take a conversation out of lists and searches; `undelete` brings it back for 30 days."""
        self._set(conversation, deleted_at=time.time())

    def undelete(self, conversation: str) -> None:
        """Bring a deleted conversation back."""
        self._set(conversation, deleted_at=None)

    def rename(self, conversation: str, title: str | None) -> None:
        """Name a conversation; None or an empty text takes the name away."""
        with self._writing() as connection:
            seq = self._seq(connection, conversation)
            self._retitle(connection, seq, title)

    def load(self, conversation: str) -> Stored:
        """Return a whole conversation, also a deleted one. Raises StoreError where there is none with this id."""
        with self._on(self._opened.reading) as connection, _snapshot(connection):
            found = connection.execute(
                "select seq, id, title, settings, model, adapter, pinned, created_at, updated_at, head"
                " from conversations where id = ?",
                (conversation,),
            ).fetchone()
            if found is None:
                raise StoreError(f"There is no conversation {conversation}.")
            seq, id_, title, settings, model, adapter, pinned, created_at, updated_at, head = found
            nodes = {
                at: rows.to_node(row)
                for at, *row in connection.execute(
                    f"select seq, {rows.COLUMNS} from messages where conversation = ? order by seq", (seq,)
                )
            }
            pieces = connection.execute(
                "select message, text, thought from pieces where message in"
                " (select seq from messages where conversation = ?) order by seq",
                (seq,),
            ).fetchall()
        said: dict[int, tuple[list[str], list[str]]] = {}
        for at, text, thought in pieces:
            texts, thoughts = said.setdefault(at, ([], []))
            texts.append(fields.text(text))
            thoughts.append(fields.text(thought))
        for at, (texts, thoughts) in said.items():
            nodes[at].text += "".join(texts)
            nodes[at].thought += "".join(thoughts)
        tree = rows.to_tree(nodes.values(), head)
        return Stored(
            id_,
            fields.text(title) or None,
            tree,
            rows.to_settings(settings),
            fields.text(model) or None,
            fields.text(adapter) or None,
            bool(pinned),
            fields.number(created_at, 0.0),
            fields.number(updated_at, 0.0),
        )

    def insert(self, stored: Stored) -> str:
        """Bring a whole conversation in: "new", "updated" where some of its messages were not here, or "unchanged".

        What is here already stays as it is but for answers that were not finished; a deleted one comes back. Also the
        way to save again what could not be saved while the disk was full. A message whose id belongs to another
        conversation gets a new one.
        """
        nodes, renamed = list(stored.tree), dict[str | None, str]()
        with self._writing() as connection:
            before = connection.execute(
                "select seq, title, deleted_at from conversations where id = ?", (stored.id,)
            ).fetchone()
            seq = before[0] if before else self._create(connection, stored, time.time())
        changed = 0
        # In parts: a long conversation in one transaction would hold other windows up.
        for begin in range(0, len(nodes), MERGED_AT_ONCE):
            with self._writing() as connection:
                for node in nodes[begin : begin + MERGED_AT_ONCE]:
                    changed += self._merge(connection, seq, _fitting(connection, seq, stored.id, node, renamed))
        with self._writing() as connection:
            if before is None or changed:
                connection.execute(
                    "update conversations set head = ?, updated_at = max(updated_at, ?) where seq = ?",
                    (renamed.get(stored.tree.head, stored.tree.head), stored.updated_at or time.time(), seq),
                )
            if before is None:
                return "new"
            _, title, deleted_at = before
            if title is None and stored.title:
                self._retitle(connection, seq, stored.title)
                changed += 1
            connection.execute("update conversations set deleted_at = null where seq = ?", (seq,))
        return "updated" if changed or deleted_at is not None else "unchanged"

    # All conversations

    def list(self, limit: int | None = None) -> builtins.list[Summary]:
        """Return what is not deleted, last changed first."""
        with self._on(self._opened.reading) as connection:
            found = connection.execute(
                """select id, title, model, pinned, updated_at,
                    (select count(*) from messages where conversation = c.seq),
                    (select substr(text, 1, 400) from messages
                        where conversation = c.seq and role = 'user' order by seq limit 1)
                from conversations c where deleted_at is null order by updated_at desc, seq desc limit ?""",
                (-1 if limit is None else limit,),
            ).fetchall()
        return list(map(rows.to_summary, found))

    def untitled(self) -> builtins.list[Summary]:
        """Return the conversations that have an answer and no title, last changed first."""
        with self._on(self._opened.reading) as connection:
            found = connection.execute(
                """select id from conversations c where title is null and deleted_at is null and exists
                    (select 1 from messages where conversation = c.seq and role = 'assistant' and finish is not null)"""
            ).fetchall()
        ids = {id_ for (id_,) in found}
        return [summary for summary in self.list() if summary.id in ids] if ids else []

    def search(self, words: str, limit: int = 50) -> builtins.list[Hit]:
        """Return where all the words stand: titles first, then messages and thoughts, the latest first.

        Each word may be the beginning of one; "words in quotes" stand as they are. No input is wrong. Of one
        conversation at most five messages are returned.
        """
        query = search.parse(words)
        if not query:
            return []
        with self._on(self._opened.searching) as connection, _snapshot(connection):
            return index.hits(connection, query, limit)

    # What belongs to no message

    def save_draft(self, conversation: str | None, text: str, attachments: tuple[Attachment, ...] = ()) -> None:
        """Keep what was typed and not sent; None is the draft of a conversation that has not begun."""
        with self._writing() as connection:
            if text or attachments:
                connection.execute(
                    "insert or replace into drafts values (?, ?, ?, ?)",
                    (conversation or "", rows.storable(text), rows.attachments_to_json(attachments), time.time()),
                )
            else:
                connection.execute("delete from drafts where conversation = ?", (conversation or "",))

    def draft(self, conversation: str | None) -> tuple[str, tuple[Attachment, ...]]:
        """Return what `save_draft` kept, else an empty text."""
        with self._on(self._opened.reading) as connection:
            found = connection.execute(
                "select text, attachments from drafts where conversation = ?", (conversation or "",)
            ).fetchone()
        return (fields.text(found[0]), rows.attachments_from_json(found[1])) if found else ("", ())

    def remember(self, text: str) -> None:
        """Add to what was typed, unless it was the last thing typed."""
        text = rows.storable(text)
        if not text.strip():
            return
        with self._writing() as connection:
            last = connection.execute("select text from typed order by seq desc limit 1").fetchone()
            if last is None or last[0] != text:
                connection.execute("insert into typed (text, at) values (?, ?)", (text, time.time()))
                connection.execute("delete from typed where seq <= (select max(seq) from typed) - ?", (KEPT_TYPED,))

    def history(self, limit: int = 500) -> builtins.list[str]:
        """Return what was typed, the latest last."""
        with self._on(self._opened.reading) as connection:
            found = connection.execute("select text from typed order by seq desc limit ?", (limit,)).fetchall()
        return [fields.text(text) for (text,) in reversed(found)]

    def approvals(self) -> set[str]:
        """Return the keys that were approved for always."""
        with self._on(self._opened.reading) as connection:
            return {key for (key,) in connection.execute("select key from approvals")}

    def approve_always(self, key: str) -> None:
        """Remember an approval."""
        with self._writing() as connection:
            connection.execute("insert or ignore into approvals values (?, ?)", (rows.storable(key), time.time()))

    def forget_approval(self, key: str) -> None:
        """Forget an approval."""
        with self._writing() as connection:
            connection.execute("delete from approvals where key = ?", (rows.storable(key),))

    # Below the contract

    @contextmanager
    def _on(self, lane: Lane) -> Iterator[sqlite3.Connection]:
        with lane.lock:
            try:
                yield lane.connection
            except sqlite3.Error as error:
                raise explained(error) from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction; whatever fails in it leaves nothing behind."""
        if self.read_only:
            raise StoreError("A newer EdgeR1 wrote your conversations, so nothing is saved here. Update EdgeR1.")
        with self._on(self._opened.writing) as connection:
            connection.execute("begin immediate")
            try:
                yield connection
                connection.execute("commit")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if connection.in_transaction:
                        connection.execute("rollback")
                raise

    def _seq(self, connection: sqlite3.Connection, conversation: str) -> int:
        found = connection.execute("select seq from conversations where id = ?", (conversation,)).fetchone()
        if found is None:
            raise StoreError(f"There is no conversation {conversation}; it may have been deleted for good.")
        return int(found[0])

    def _set(self, conversation: str, **columns: Any) -> None:
        with self._writing() as connection:
            seq = self._seq(connection, conversation)
            names = ", ".join(f"{name} = ?" for name in columns)
            connection.execute(f"update conversations set {names} where seq = ?", (*columns.values(), seq))

    def _create(self, connection: sqlite3.Connection, stored: Stored, moment: float) -> int:
        created = connection.execute(
            "insert into conversations (id, model, adapter, settings, pinned, created_at, updated_at)"
            " values (?, ?, ?, ?, ?, ?, ?)",
            (
                stored.id,
                rows.optional(stored.model),
                rows.optional(stored.adapter),
                rows.storable(rows.dumped(stored.settings.to_json())),
                int(stored.pinned),
                stored.created_at or moment,
                stored.updated_at or moment,
            ),
        )
        seq = created.lastrowid
        assert seq is not None
        if stored.title:
            self._retitle(connection, seq, stored.title)
        return seq

    def _retitle(self, connection: sqlite3.Connection, seq: int, title: str | None) -> None:
        title = " ".join(rows.storable(title or "").split())[:_TITLE_LENGTH] or None
        (before,) = connection.execute("select title from conversations where seq = ?", (seq,)).fetchone()
        index.take_out(connection, "title_index", seq, title=before or "")
        connection.execute("update conversations set title = ? where seq = ?", (title, seq))
        index.put(connection, "title_index", seq, title=title or "")

    def _insert(self, connection: sqlite3.Connection, conversation: int, node: Node) -> None:
        row = rows.to_row(node)
        if node.parent is not None:
            found = connection.execute("select conversation from messages where id = ?", (node.parent,)).fetchone()
            if found is None or found[0] != conversation:
                raise StoreError("A message follows one that is not saved; save that one first.")
        added = connection.execute(
            f"insert into messages ({rows.COLUMNS}, conversation) values ({', '.join('?' * (len(row) + 1))})",
            (*row.values(), conversation),
        )
        index.put(connection, "message_index", added.lastrowid, text=row["text"], thought=row["thought"])

    def _finish(self, connection: sqlite3.Connection, node: Node) -> int:
        found = connection.execute(
            "select seq, conversation, text, thought from messages where id = ?", (node.id,)
        ).fetchone()
        if found is None:
            raise StoreError("A message was finished that was never saved; save it first.")
        seq, conversation, text, thought = found
        row = rows.to_row(node)
        changed = {name: row[name] for name in ("text", "thought", "thought_s", "model", "finish", "figures", "calls")}
        names = ", ".join(f"{name} = ?" for name in changed)
        connection.execute(f"update messages set {names} where seq = ?", (*changed.values(), seq))
        connection.execute("delete from pieces where message = ?", (seq,))
        if (text, thought) != (row["text"], row["thought"]):
            index.take_out(connection, "message_index", seq, text=text, thought=thought)
            index.put(connection, "message_index", seq, text=row["text"], thought=row["thought"])
        return int(conversation)

    def _merge(self, connection: sqlite3.Connection, conversation: int, node: Node) -> bool:
        """Save a message that is not here, or the end of an answer that has none; whether there was anything to do."""
        here = connection.execute("select role, finish from messages where id = ?", (node.id,)).fetchone()
        if here is None:
            self._insert(connection, conversation, node)
        elif here == ("assistant", None) and node.finish is not None:
            self._finish(connection, node)
        else:
            return False
        return True

    def _purge(self) -> None:
        """Remove for good what was deleted long ago."""
        with self._on(self._opened.reading) as connection:
            gone = connection.execute(
                "select seq from conversations where deleted_at < ?", (time.time() - KEPT_DELETED_S,)
            ).fetchall()
        for (seq,) in gone:
            with self._writing() as connection:
                found = connection.execute(
                    "select id, title from conversations where seq = ? and deleted_at is not null", (seq,)
                ).fetchone()
                if found is None:
                    continue
                for at, text, thought in connection.execute(
                    "select seq, text, thought from messages where conversation = ?", (seq,)
                ).fetchall():
                    index.take_out(connection, "message_index", at, text=text, thought=thought)
                connection.execute(
                    "delete from pieces where message in (select seq from messages where conversation = ?)", (seq,)
                )
                connection.execute("delete from messages where conversation = ?", (seq,))
                index.take_out(connection, "title_index", seq, title=found[1] or "")
                connection.execute("delete from drafts where conversation = ?", (found[0],))
                connection.execute("delete from conversations where seq = ?", (seq,))

    def _fold_stale(self) -> None:
        """Make the pieces of answers that nobody finished searchable text; a live one goes on after it unharmed."""
        with self._on(self._opened.reading) as connection:
            stale = connection.execute(
                "select distinct message from pieces where message in (select seq from messages where created_at < ?)",
                (time.time() - STALE_S,),
            ).fetchall()
        for (seq,) in stale:
            with self._writing() as connection:
                text, thought = connection.execute(
                    "select text, thought from messages where seq = ?", (seq,)
                ).fetchone()
                pieces = connection.execute(
                    "select text, thought from pieces where message = ? order by seq", (seq,)
                ).fetchall()
                whole = (
                    "".join(fields.text(each) for each in (text, *(piece for piece, _ in pieces))),
                    "".join(fields.text(each) for each in (thought, *(piece for _, piece in pieces))),
                )
                connection.execute("update messages set text = ?, thought = ? where seq = ?", (*whole, seq))
                connection.execute("delete from pieces where message = ?", (seq,))
                index.take_out(connection, "message_index", seq, text=text, thought=thought)
                index.put(connection, "message_index", seq, text=whole[0], thought=whole[1])


@contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Let several reads see one state, whatever other windows write between them."""
    if connection.in_transaction:
        yield
        return
    connection.execute("begin")
    try:
        yield
    finally:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("rollback")


def _fitting(
    connection: sqlite3.Connection, conversation: int, id_: str, node: Node, renamed: dict[str | None, str]
) -> Node:
    """Return a message under an id that is free or its own, with a parent under the id that that one got."""
    from dataclasses import replace
    from uuid import NAMESPACE_OID, uuid5

    taken = connection.execute("select conversation from messages where id = ?", (node.id,)).fetchone()
    if taken is not None and taken[0] != conversation:
        renamed[node.id] = uuid5(NAMESPACE_OID, f"{id_} {node.id}").hex
    new, parent = renamed.get(node.id, node.id), renamed.get(node.parent, node.parent)
    return node if (new, parent) == (node.id, node.parent) else replace(node, id=new, parent=parent)
