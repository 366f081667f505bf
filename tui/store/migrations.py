"""The database's layout, as the steps that led to it.

A step that was released never changes and is never removed; a later one is added at the end. A database records the
names of the steps that it has: a name that is not here was given by a newer EdgeR1.
"""

from __future__ import annotations

import sqlite3
import time

APPLICATION_ID = 0x45523143
"""What the file's header says that it is ("ER1C"), so that another program's database is not taken for ours."""

# Titles, messages and thoughts are indexed without a copy of their text; see `search.indexed` for what goes in.
_INDEX = "content = '', columnsize = 0, prefix = '1 2 3', tokenize = \"{}\"".format(
    "unicode61 remove_diacritics 2 categories 'L* N* Co So'"
)

MIGRATIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        "conversations",
        (
            """create table conversations (
                seq integer primary key, id text not null unique, title text, model text, adapter text,
                settings text not null, head text, pinned integer not null default 0,
                created_at real not null, updated_at real not null, deleted_at real
            )""",
            """create table messages (
                seq integer primary key, id text not null unique,
                conversation integer not null references conversations(seq), parent text, role text not null,
                text text not null, thought text not null, created_at real not null, thought_s real, model text,
                finish text, figures text, attachments text, calls text, call_id text
            )""",
            "create index messages_of_conversation on messages(conversation)",
            """create table pieces (
                seq integer primary key, message integer not null references messages(seq),
                text text not null, thought text not null
            )""",
            "create index pieces_of_message on pieces(message)",
            f"create virtual table message_index using fts5(text, thought, {_INDEX})",
            f"create virtual table title_index using fts5(title, {_INDEX})",
        ),
    ),
    (
        "drafts_history_approvals",
        (
            "create table drafts (conversation text primary key, text text not null, attachments text, at real)",
            "create table typed (seq integer primary key, text text not null, at real)",
            "create table approvals (key text primary key, at real)",
        ),
    ),
)


def recorded(connection: sqlite3.Connection) -> set[str] | None:
    """Return the names of the steps that a database has; None where it holds something that is not ours."""
    tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    if "migrations" not in tables:
        return None if tables else set()
    (application,) = connection.execute("pragma application_id").fetchone()
    if application != APPLICATION_ID:
        return None
    return {name for (name,) in connection.execute("select name from migrations")}


def unknown(names: set[str]) -> set[str]:
    """Return those of the names that a newer EdgeR1 has given."""
    return names - {name for name, _ in MIGRATIONS}


def migrate(connection: sqlite3.Connection) -> None:
    """Take the steps that a database does not have yet, each whole or not at all.

    Safe beside another window that does the same: what is missing is looked up under the write lock.
    """
    for name, statements in MIGRATIONS:
        connection.execute("begin immediate")
        try:
            if name not in (recorded(connection) or ()):
                connection.execute("create table if not exists migrations (name text primary key, at real not null)")
                connection.execute(f"pragma application_id = {APPLICATION_ID}")
                for statement in statements:
                    connection.execute(statement)
                connection.execute("insert into migrations values (?, ?)", (name, time.time()))
            connection.execute("commit")
        except BaseException:
            if connection.in_transaction:
                connection.execute("rollback")
            raise
