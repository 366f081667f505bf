"""Reads the logs of `llm` (https://llm.datasette.io): a SQLite file in one of three layouts, or more of them at once.

From 0.1 a table `log`, later `logs`, whose rows have a `chat_id`; from 0.7 `conversations` and `responses`, to which
attachments, fragments, tools and reasoning were added; from 0.32 `threads` and `turns` over a tree of `messages` with
`parts`. A table is read by the columns that it has. Of an attachment only text is taken; anything else is named.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from edger1.errors import FormatError
from edger1.tui.settings import Settings
from edger1.tui.store import fields, rows
from edger1.tui.store.records import Stored
from edger1.tui.tree import Attachment, Call, Node

_LONGEST_BYTES = 64 << 20
_LONGEST_CHAIN = 100_000
_Row = dict[str, Any]


def read(path: Path) -> Iterator[Stored]:
    """Return the conversations one by one. Raises FormatError where the file is none of `llm` or is damaged."""
    try:
        with closing(_connect(path)) as connection:
            logs = _Logs(connection)
            if not logs.any():
                raise FormatError(f"{path} is a database, but not the logs.db of llm; nothing was brought in.")
            yield from logs.single()
            yield from logs.responses()
            yield from logs.threads()
    except sqlite3.Error as error:
        raise FormatError(f"{path} cannot be read as a database ({error}); nothing was brought in.") from error


def _connect(path: Path) -> sqlite3.Connection:
    """Connect without writing: where the file's folder may not be written either, as a file that does not change."""
    for mode in ("ro", "ro&immutable=1"):
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=5)
        try:
            connection.execute("pragma trusted_schema = off")
            connection.text_factory = lambda found: found.decode("utf-8", "replace")
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_BYTES)
            connection.execute("select count(*) from sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError:
            connection.close()
            if mode != "ro":
                raise
    raise AssertionError


class _Logs:
    """The tables that are there, and what they hold."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        names = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
        self.tables = {
            fields.text(name): {
                fields.text(row[1]) for row in connection.execute(f"pragma table_info({_quoted(name)})")
            }
            for (name,) in names
        }

    def any(self) -> bool:
        """Whether one of the layouts is here."""
        return (
            any({"prompt", "response"} <= self.tables.get(name, set()) for name in ("log", "logs", "responses"))
            or {"turns", "threads", "messages", "parts"} <= self.tables.keys()
        )

    def rows(self, table: str, where: str = "", *given: Any) -> Iterator[_Row]:
        """Return rows as mappings of the columns that there are."""
        if table not in self.tables:
            return
        cursor = self.connection.execute(f"select * from {_quoted(table)} {where}", given)
        names = [each[0] for each in cursor.description]
        for row in cursor:
            yield dict(zip(names, row, strict=True))

    def ids(self, table: str, column: str, order: str) -> list[Any]:
        """Return the different values of a column in the order of another."""
        if column not in self.tables.get(table, ()):
            return []
        by = f"min({_quoted(order)})" if order in self.tables[table] else "min(rowid)"
        found = self.connection.execute(
            f"select {_quoted(column)} from {_quoted(table)} where {_quoted(column)} is not null"
            f" group by {_quoted(column)} order by {by}"
        )
        return [value for (value,) in found]

    # The first layout

    def single(self) -> Iterator[Stored]:
        """Return the conversations of `log` or `logs`: a chat is the row that began it and those that name it."""
        for table in ("log", "logs"):
            columns = self.tables.get(table, set())
            if not {"prompt", "response"} <= columns:
                continue
            chats = "coalesce(chat_id, rowid)" if "chat_id" in columns else "rowid"
            ids = self.connection.execute(f"select distinct {chats} from {table} order by 1").fetchall()
            for (chat,) in ids:
                asked = list(self.rows(table, f"where {chats} = ? order by rowid", chat))
                yield self._linear("log", str(chat), None, asked, {})

    # The second layout

    def responses(self) -> Iterator[Stored]:
        """Return the conversations of `responses`; one that belongs to none is one of its own."""
        if not {"prompt", "response"} <= self.tables.get("responses", set()):
            return
        for id_ in self.ids("responses", "conversation_id", "datetime_utc"):
            order = "order by datetime_utc, rowid" if "datetime_utc" in self.tables["responses"] else "order by rowid"
            asked = list(self.rows("responses", f"where conversation_id = ? {order}", id_))
            named = next(self.rows("conversations", "where id = ?", id_), {})
            yield self._linear("responses", str(id_), fields.text(named.get("name")), asked, named)
        alone = "where conversation_id is null" if "conversation_id" in self.tables["responses"] else ""
        for row in self.rows("responses", f"{alone} order by rowid"):
            yield self._linear("response", str(row.get("id")), None, [row], {})

    def _linear(self, layout: str, id_: str, name: str | None, asked: list[_Row], named: _Row) -> Stored:
        nodes: list[Node] = []

        def add(node: Node, key: str) -> None:
            node.id = fields.own_id("llm", layout, id_, key)
            node.parent = nodes[-1].id if nodes else None
            nodes.append(node)

        system = None
        for number, row in enumerate(asked):
            key = str(row.get("id", number))
            at = fields.moment(row.get("datetime_utc") or row.get("timestamp_utc") or row.get("timestamp"))
            attached, mentioned = self._attachments("prompt_attachments", "response_id", row.get("id"))
            attached = self._fragments("prompt_fragments", row.get("id")) + attached
            results = list(self.rows("tool_results", "where response_id = ? order by id", row.get("id")))
            if system is None:
                given = [*(each.text for each in self._fragments("system_fragments", row.get("id")))]
                system = "\n\n".join(filter(None, (*given, fields.text(row.get("system"))))) or None
            for at_, result in enumerate(results):
                said = fields.text(result.get("output"))
                add(Node("tool", said, created_at=at, call_id=fields.text(result.get("tool_call_id"))), f"{key} t{at_}")
            prompt = "\n".join(filter(None, (fields.text(row.get("prompt")), *mentioned)))
            if prompt or attached or not results:
                add(Node("user", prompt, created_at=at, attachments=tuple(attached)), f"{key} q")
            calls = tuple(map(_call, self.rows("tool_calls", "where response_id = ? order by id", row.get("id"))))
            duration = row.get("duration_ms")
            answer = Node(
                "assistant",
                fields.text(row.get("response")),
                created_at=at + (duration / 1000 if isinstance(duration, int) and 0 < duration < 1e9 else 0.0),
                thought=fields.text(row.get("reasoning")),
                model=fields.text(row.get("model")) or None,
                finish="tools" if calls else "stop",
                calls=calls,
            )
            add(answer, f"{key} a")
        model = fields.text(named.get("model")) or (nodes[-1].model if nodes else None)
        return _stored(layout, id_, name, nodes, None, system, model)

    # The third layout

    def threads(self) -> Iterator[Stored]:
        """Return the conversations of `turns`: a thread, with what was said in its turns and is not its end."""
        if not {"turns", "threads", "messages", "parts"} <= self.tables.keys():
            return
        for thread in self.rows("threads", "order by rowid"):
            turns = list(self.rows("turns", "where thread_id = ? order by rowid", thread.get("id")))
            yield self._thread("threads", thread, turns)
        for turn in self.rows("turns", "where thread_id is null order by rowid"):
            yield self._thread("turn", {"id": turn.get("id")}, [turn])

    def _thread(self, layout: str, thread: _Row, turns: list[_Row]) -> Stored:
        id_ = str(thread.get("id"))
        nodes: list[Node] = []
        places: dict[str, str | None] = {}
        system: list[str] = []
        tips = [(turn.get("tip_message_hash"), turn) for turn in turns]
        tips.append((thread.get("tip_message_hash"), {"datetime_utc": thread.get("datetime_utc")}))
        for tip, turn in tips:
            parent: str | None = None
            for message in self._chain(tip, places):
                hash_ = fields.text(message.get("hash"))
                parent = places.get(fields.text(message.get("parent_hash")))
                for number, node in enumerate(self._message(message, turn, system)):
                    node.id, node.parent = fields.own_id("llm", layout, id_, hash_, str(number)), parent
                    nodes.append(node)
                    parent = node.id
                places[hash_] = parent
        model = next((fields.text(turn.get("model")) for turn in turns if turn.get("model")), None)
        head = places.get(fields.text(thread.get("tip_message_hash")))
        name = fields.text(thread.get("name"))
        return _stored(layout, id_, name, nodes, head, "\n\n".join(system) or None, model)

    def _chain(self, tip: Any, known: dict[str, str | None]) -> list[_Row]:
        """Return the messages from the first that is not known to `tip`."""
        chain: list[_Row] = []
        seen: set[str] = set()
        at = fields.text(tip)
        while at and at not in known and at not in seen and len(chain) < _LONGEST_CHAIN:
            seen.add(at)
            message = next(self.rows("messages", "where hash = ?", at), None)
            if message is None:
                break
            chain.append(message)
            at = fields.text(message.get("parent_hash"))
        return chain[::-1]

    def _message(self, message: _Row, turn: _Row, system: list[str]) -> list[Node]:
        role = fields.text(message.get("role"))
        at = fields.moment(turn.get("datetime_utc"))
        texts, thoughts, attachments, calls, results = [], [], [], [], []
        for part in self.rows("parts", "where message_hash = ? order by position", message.get("hash")):
            kind, payload = part.get("type"), _json(part.get("payload"))
            if kind == "text":
                texts.append(self._text(part, payload))
            elif kind == "reasoning":
                thoughts.append(self._text(part, payload))
            elif kind == "tool_call":
                calls.append(_call(payload | {"name": part.get("tool_name") or payload.get("name")}))
            elif kind == "tool_result":
                said = fields.text(payload.get("output")) or self._text(part, payload)
                results.append(Node("tool", said, created_at=at, call_id=fields.text(payload.get("tool_call_id"))))
            elif kind == "attachment":
                wanted = fields.mapping(payload.get("attachment")).get("id")
                for row in self.rows("attachments", "where id = ?", wanted):
                    attached, mentioned = _attached(row)
                    attachments += attached
                    texts += mentioned
        text = "\n".join(filter(None, texts))
        if role == "system":
            if text and text not in system:
                system.append(text)
            return []
        if role == "assistant":
            model = fields.text(turn.get("model")) or None
            finish = "tools" if calls else "stop"
            thought = "\n".join(filter(None, thoughts))
            return [
                Node("assistant", text, created_at=at, thought=thought, model=model, finish=finish, calls=tuple(calls))
            ]
        if results:
            return results
        return [Node("user", text, created_at=at, attachments=tuple(attachments))]

    def _text(self, part: _Row, payload: _Row) -> str:
        """Return a part's text; where it borrows fragments, with these in their places."""
        if part.get("text") is not None:
            return fields.text(part["text"])
        if "text_ref" not in payload:
            return fields.text(payload.get("text"))
        said = []
        for piece in map(fields.mapping, fields.listed(payload["text_ref"])):
            if "literal" in piece:
                said.append(fields.text(piece["literal"]))
            else:
                fragment = piece.get("fragment")
                said += [fields.text(row.get("content")) for row in self.rows("fragments", "where id = ?", fragment)]
        return "".join(said)

    # What goes with a prompt

    def _attachments(self, table: str, column: str, of: Any) -> tuple[list[Attachment], list[str]]:
        if not {table, "attachments"} <= self.tables.keys():
            return [], []
        texts: list[Attachment] = []
        names: list[str] = []
        for link in self.rows(table, f'where {column} = ? order by "order"', of):
            for row in self.rows("attachments", "where id = ?", link.get("attachment_id")):
                attached, mentioned = _attached(row)
                texts += attached
                names += mentioned
        return texts, names

    def _fragments(self, table: str, of: Any) -> list[Attachment]:
        if not {table, "fragments"} <= self.tables.keys():
            return []
        found = []
        for link in self.rows(table, 'where response_id = ? order by "order"', of):
            for row in self.rows("fragments", "where id = ?", link.get("fragment_id")):
                source = fields.text(row.get("source"))
                found.append(Attachment(source or f"fragment {row.get('id')}", fields.text(row.get("content"))))
        return found


def _stored(
    layout: str, id_: str, name: str | None, nodes: list[Node], head: str | None, system: str | None, model: str | None
) -> Stored:
    times = [node.created_at for node in nodes] or [fields.moment(None)]
    return Stored(
        fields.own_id("llm", layout, id_),
        name or None,
        rows.to_tree(nodes, head),
        Settings(system=system),
        model,
        created_at=min(times),
        updated_at=max(times),
    )


def _attached(row: _Row) -> tuple[list[Attachment], list[str]]:
    """Return an attachment's text, or else what names it."""
    kind, content = fields.text(row.get("type")), row.get("content")
    path, url = fields.text(row.get("path")), fields.text(row.get("url"))
    if kind.startswith("text/") and isinstance(content, bytes | str):
        return [Attachment(Path(path).name or url or "attachment", fields.text(content), path or None)], []
    return [], [f"[{kind or 'file'}: {path or url}]" if path or url else f"[{kind or 'file'}]"]


def _call(row: _Row) -> Call:
    arguments = row.get("arguments")
    found = arguments if isinstance(arguments, dict) else _json(arguments)
    return Call(fields.text(row.get("tool_call_id")), fields.text(row.get("name")) or "tool", found)


def _json(value: Any) -> _Row:
    try:
        return fields.mapping(json.loads(value))
    except (ValueError, TypeError, RecursionError):
        return {}


def _quoted(name: Any) -> str:
    return '"' + fields.text(name).replace('"', '""') + '"'
