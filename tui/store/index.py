"""The index of titles and messages: how rows get in, and what a query finds in it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from typing import Any

from edger1.tui.store import fields, search
from edger1.tui.store.records import Hit

HITS_A_CONVERSATION = 5
_BEGINS_LENGTH = 80


def put(connection: sqlite3.Connection, table: str, seq: int | None, **texts: str) -> None:
    """Put texts in under a row's number."""
    if any(texts.values()):
        _into(connection, table, "", seq, texts)


def take_out(connection: sqlite3.Connection, table: str, seq: int, **texts: str) -> None:
    """Take out what was put in; FTS5 keeps no copy, so that it must be told exactly that."""
    if any(texts.values()):
        _into(connection, table, "delete", seq, texts)


def _into(connection: sqlite3.Connection, table: str, command: str, seq: int | None, texts: dict[str, str]) -> None:
    columns = ["rowid", *texts]
    values: list[Any] = [seq, *(search.indexed(fields.text(each)) for each in texts.values())]
    if command:
        columns, values = [table, *columns], [command, *values]
    places = ", ".join("?" * len(values))
    connection.execute(f"insert into {table} ({', '.join(columns)}) values ({places})", values)


def hits(connection: sqlite3.Connection, query: search.Query, limit: int) -> list[Hit]:
    """Return titles and then messages that have all the words, of each the latest first."""
    found = list(_title_hits(connection, query, limit))
    found += _message_hits(connection, query, limit - len(found))
    return found


def begins(text: str | None) -> str:
    """Return how a text begins, as one line."""
    line = " ".join(fields.text(text).split())
    return line if len(line) <= _BEGINS_LENGTH else line[: _BEGINS_LENGTH - 1] + "…"


_NAMED = """coalesce(c.title, (select substr(text, 1, 400) from messages
    where conversation = c.seq and role = 'user' order by seq limit 1))"""


def _title_hits(connection: sqlite3.Connection, query: search.Query, limit: int) -> Iterator[Hit]:
    where, given = ["c.deleted_at is null", "c.title is not null"], []
    if query.match:
        where.append("c.seq in (select rowid from title_index where title_index match ?)")
        given.append(query.match)
    for word in query.literal:
        where.append("instr(c.title, ?) > 0")
        given.append(word)
    for id_, title, at in connection.execute(
        f"select c.id, c.title, c.updated_at from conversations c where {' and '.join(where)}"
        " order by c.updated_at desc limit ?",
        (*given, limit),
    ):
        line, marks = search.snippet(fields.text(title), query.patterns)
        yield Hit(id_, begins(title), None, "title", line, marks, fields.number(at, 0.0))


def _message_hits(connection: sqlite3.Connection, query: search.Query, limit: int) -> Iterator[Hit]:
    where, given = ["c.deleted_at is null"], []
    if query.match:
        where.append("m.seq in (select rowid from message_index where message_index match ?)")
        given.append(query.match)
    for word in query.literal:
        where.append("(instr(m.text, ?) > 0 or instr(m.thought, ?) > 0)")
        given += [word, word]
    # Without the texts, which a sort would copy; they are read of what is returned.
    found = connection.execute(
        f"""select m.seq, c.seq from messages m join conversations c on c.seq = m.conversation
        where {" and ".join(where)} order by m.created_at desc, m.seq desc""",
        given,
    )
    seen: dict[int, int] = {}
    for seq, of in found:
        if limit <= 0:
            return
        seen[of] = seen.get(of, 0) + 1
        if seen[of] > HITS_A_CONVERSATION:
            continue
        limit -= 1
        conversation, title, node, role, text, thought, at = connection.execute(
            f"""select c.id, {_NAMED}, m.id, m.role, m.text, m.thought, m.created_at
            from messages m join conversations c on c.seq = m.conversation where m.seq = ?""",
            (seq,),
        ).fetchone()
        text, thought = fields.text(text), fields.text(thought)
        folded = search.fold(text)
        shown = text if any(pattern.search(folded) for pattern in query.patterns) or not thought else thought
        line, marks = search.snippet(shown, query.patterns)
        yield Hit(conversation, begins(title) or "Empty conversation", node, role, line, marks, fields.number(at, 0.0))
