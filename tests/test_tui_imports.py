"""Conversations from other programs' files, and files that are not what they say."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edger1.errors import EdgeR1Error, FormatError
from edger1.messages import Sampling
from edger1.tui.settings import Settings
from edger1.tui.store import Store, Stored, chatgpt, json_stream
from edger1.tui.store.export import to_json, to_markdown
from edger1.tui.store.imports import Imported, bring_in, read
from edger1.tui.tree import Attachment, Call, Node, Tree


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "conversations.db")


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    if isinstance(content, str):
        content = {"content_type": "text", "parts": [content]}
    return {"author": {"role": role, "name": more.pop("name", None)}, "content": content, "create_time": 5.0, **more}


def conversation(*nodes: tuple[str, str | None, dict[str, Any] | None], **more: Any) -> dict[str, Any]:
    mapping: dict[str, Any] = {
        key: {"id": key, "parent": parent, "message": said, "children": []} for key, parent, said in nodes
    }
    for key, parent, _ in nodes:
        if parent in mapping:
            mapping[parent]["children"].append(key)
    return {"id": "c1", "title": "T", "create_time": 1.5, "update_time": 9.0, "mapping": mapping, **more}


SIMPLE = conversation(
    ("root", None, None),
    ("sys", "root", message("system", "", weight=0.0)),
    ("q", "sys", message("user", "Why is the sky blue?")),
    ("a1", "q", message("assistant", "Rayleigh", metadata={"model_slug": "gpt-4o"})),
    ("a2", "q", message("assistant", "Scattering", metadata={"model_slug": "gpt-4o"})),
    ("q2", "a1", message("user", "Thanks")),
    current_node="q2",
)


def write(tmp_path: Path, value: Any, name: str = "conversations.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_chatgpts_branches_are_kept(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path, [SIMPLE])
    assert bring_in(store, path) == Imported(new=1)
    (summary,) = store.list()
    found = store.load(summary.id)
    assert (found.title, found.created_at, found.updated_at, found.model) == ("T", 1.5, 9.0, "gpt-4o")
    assert [(node.role, node.text) for node in found.tree.path()] == [
        ("user", "Why is the sky blue?"),
        ("assistant", "Rayleigh"),
        ("user", "Thanks"),
    ]
    first = found.tree.path()[0]
    assert [node.text for node in found.tree.siblings(found.tree.path()[1].id)] == ["Rayleigh", "Scattering"]
    assert first.parent is None
    assert store.search("scatt")


def test_the_same_file_twice_adds_nothing_and_a_later_one_adds_what_is_new(store: Store, tmp_path: Path) -> None:
    bring_in(store, write(tmp_path, [SIMPLE]))
    assert bring_in(store, write(tmp_path, [SIMPLE])) == Imported(unchanged=1)
    later = json.loads(json.dumps(SIMPLE))
    later["mapping"]["a3"] = {"parent": "q2", "message": message("assistant", "You are welcome"), "children": []}
    later["current_node"] = "a3"
    other = conversation(("q", None, message("user", "other")), id="c2")
    assert bring_in(store, write(tmp_path, [later, other])) == Imported(new=1, updated=1)
    found = next(store.load(each.id) for each in store.list() if each.title == "T" and each.message_count == 5)
    assert [node.text for node in found.tree.path()][-1] == "You are welcome"


@pytest.mark.parametrize("name", ["conversations.json", "export/conversations-000.json"])
def test_chatgpts_archive(store: Store, tmp_path: Path, name: str) -> None:
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("chat.html", "<html>")
        archive.writestr("shared_conversations.json", "[1]")
        archive.writestr(name, json.dumps([SIMPLE]))
        archive.writestr(
            "conversations-001.json", json.dumps([conversation(("q", None, message("user", "x")), id="y")])
        )
    assert bring_in(store, path) == Imported(new=2)


def test_chatgpts_reasoning_is_the_thought_of_the_answer() -> None:
    thoughts = {
        "content_type": "thoughts",
        "thoughts": [{"summary": "Sum", "content": "One and one."}, {"summary": "Ok"}],
    }
    found = chatgpt.conversation(
        conversation(
            ("q", None, message("user", "1+1?")),
            ("t", "q", message("assistant", thoughts)),
            (
                "r",
                "t",
                message(
                    "assistant",
                    {"content_type": "reasoning_recap", "content": "Thought for 3s"},
                    metadata={"finished_duration_sec": 3},
                ),
            ),
            ("a", "r", message("assistant", "2", metadata={"finish_details": {"type": "max_tokens"}})),
            ("q2", "a", message("user", "2+2?")),
            ("t2", "q2", message("assistant", thoughts)),
            ("q3", "t2", message("user", "never mind")),
            ("t3", "q3", message("assistant", thoughts)),
            current_node="t3",
        )
    )
    path = found.tree.path()
    thought = "**Sum**\n\nOne and one.\n\nOk"
    assert [(n.role, n.text, n.thought, n.thought_s, n.finish) for n in path] == [
        ("user", "1+1?", "", None, None),
        ("assistant", "2", thought, 3.0, "length"),
        ("user", "2+2?", "", None, None),
        ("assistant", "", thought, None, "cancelled"),
        ("user", "never mind", "", None, None),
        ("assistant", "", thought, None, "cancelled"),
    ]


def test_chatgpts_tools_pictures_and_files() -> None:
    picture = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://file-abc"}
    sound = {"content_type": "audio_transcription", "text": "spoken"}
    found = chatgpt.conversation(
        conversation(
            ("s", None, message("system", "Be brief.")),
            (
                "q",
                "s",
                message(
                    "user",
                    {
                        "content_type": "multimodal_text",
                        "parts": [picture, sound, "look", {"content_type": "new_kind"}, 5, None],
                    },
                    metadata={"attachments": [{"name": "a.pdf"}]},
                ),
            ),
            ("c", "q", message("assistant", {"content_type": "code", "text": "print(1)"}, recipient="python")),
            ("o", "c", message("tool", {"content_type": "execution_output", "text": "1"}, name="python")),
            ("o2", "o", message("tool", {"content_type": "tether_quote", "title": "A", "url": "u", "text": "B"})),
            ("a", "o2", message("assistant", "done")),
            ("lone", "a", message("tool", {"content_type": "system_error", "name": "E", "text": "bad"}, name="web")),
            ("hid", "lone", message("user", "secret", metadata={"is_visually_hidden_from_conversation": True})),
            ("e", "hid", message("user", "end")),
            ("lone2", "e", message("tool", "r", name="web")),
            current_node="lone2",
        )
    )
    assert found.settings.system == "Be brief."
    path = found.tree.path()
    assert [(node.role, node.text) for node in path] == [
        ("user", "[image: file-abc]\nspoken\nlook\n[new_kind]\n[file: a.pdf]"),
        ("assistant", ""),
        ("tool", "1"),
        ("tool", "A\nu\nB"),
        ("assistant", "done"),
        ("tool", "E: bad"),
        ("user", "end"),
        ("assistant", ""),
        ("tool", "r"),
    ]
    assert path[1].calls == (Call("c", "python", {"input": "print(1)"}),)
    assert [node.call_id for node in path if node.role == "tool"] == ["c", "c", "lone", "lone2"]


KEYS = st.sampled_from("abcdefgh")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
MESSAGES = (
    st.none()
    | JSON
    | st.fixed_dictionaries(
        {
            "author": JSON | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system"])}),
            "content": JSON
            | st.fixed_dictionaries({"content_type": st.just("text"), "parts": JSON | st.lists(st.text(max_size=5))})
            | st.fixed_dictionaries({"content_type": st.just("thoughts"), "thoughts": JSON}),
            "metadata": JSON,
        },
        optional={"create_time": JSON, "recipient": JSON, "weight": JSON},
    )
)
NODES = st.fixed_dictionaries({"parent": KEYS | JSON, "children": st.lists(KEYS) | JSON, "message": MESSAGES})


@given(st.dictionaries(KEYS, NODES | JSON), JSON, JSON, JSON)
def test_any_mapping_can_be_read(mapping: dict[str, Any], id_: Any, title: Any, time: Any) -> None:
    value = {"mapping": mapping, "id": id_, "title": title, "create_time": time, "current_node": id_}
    found = chatgpt.conversation(value)
    for node in found.tree:
        assert node.parent is None or node.parent in found.tree
    with contextlib.closing(Store.open(Path("/proc/nothing/x.db"))) as store:
        assert store.insert(found) == "new"
        assert store.insert(found) == "unchanged"
        assert len(store.load(found.id).tree) == len(found.tree)


def test_a_circle_of_parents_loses_no_message() -> None:
    value = conversation(("a", "b", message("user", "one")), ("b", "a", message("assistant", "two")))
    assert sorted(node.text for node in chatgpt.conversation(value).tree) == ["one", "two"]


def test_a_conversation_of_ten_thousand_messages_is_no_deep_recursion() -> None:
    nodes = [(str(at), str(at - 1) if at else None, message("user", str(at))) for at in range(10_000)]
    assert len(chatgpt.conversation(conversation(*nodes)).tree.path()) == 10_000


# llm


OLD = """
create table log (id integer primary key, model text, timestamp text, prompt text, system text, response text,
    chat_id integer);
insert into log values (1, 'gpt-3', '2023-04-01 10:00:00', 'first', 'be brief', 'one', null);
insert into log values (2, 'gpt-3', '2023-04-01 10:01:00', 'second', null, 'two', 1);
insert into log values (3, 'gpt-3', '2023-04-02 10:00:00', 'alone', null, 'three', null);
"""
MIDDLE = """
create table conversations (id text primary key, name text, model text);
create table responses (id text primary key, model text, prompt text, system text, prompt_json text, options_json text,
    response text, response_json text, conversation_id text, duration_ms integer, datetime_utc text);
insert into conversations values ('c1', 'Greeting', 'gpt-4');
insert into responses values ('r1', 'gpt-4', 'hi', 'be kind', null, null, 'hello', null, 'c1', 1500,
    '2024-01-01T00:00:00');
insert into responses values ('r2', 'gpt-4', 'sum', null, null, null, '', null, 'c1', 10, '2024-01-01T00:01:00');
insert into responses values ('r3', 'gpt-4', '', null, null, null, 'it is 3', null, 'c1', 10, '2024-01-01T00:02:00');
insert into responses values ('r4', 'gpt-4', 'alone', null, null, null, 'x', null, null, 10, 'no date');
"""
EXTRAS = """
create table attachments (id text primary key, type text, path text, url text, content blob);
create table prompt_attachments (response_id text, attachment_id text, "order" integer);
create table fragments (id integer primary key, hash text, content text, datetime_utc text, source text);
create table prompt_fragments (response_id text, fragment_id integer, "order" integer);
create table system_fragments (response_id text, fragment_id integer, "order" integer);
create table tool_calls (id integer primary key, response_id text, tool_id integer, name text, arguments text,
    tool_call_id text);
create table tool_results (id integer primary key, response_id text, tool_id integer, name text, output text,
    tool_call_id text);
alter table responses add column reasoning text;
update responses set reasoning = 'hm' where id = 'r3';
insert into attachments values ('t', 'text/plain', '/x/notes.txt', null, x'776f726473');
insert into attachments values ('p', 'image/png', null, 'https://example.com/a.png', null);
insert into prompt_attachments values ('r1', 'p', 1), ('r1', 't', 0);
insert into fragments values (1, 'h', 'a fragment', '', 'f.md'), (2, 'i', 'system part', '', null);
insert into prompt_fragments values ('r1', 1, 0);
insert into system_fragments values ('r1', 2, 0);
insert into tool_calls values (1, 'r2', 1, 'add', '{"a": 1, "b": 2}', 'k');
insert into tool_results values (1, 'r3', 1, 'add', '3', 'k');
"""
NEW = """
create table attachments (id text primary key, type text, path text, url text, content blob);
create table fragments (id integer primary key, hash text, content text, datetime_utc text, source text);
create table messages (hash text primary key, parent_hash text, role text, provider_metadata text);
create table parts (id integer primary key, message_hash text, position integer, type text, tool_name text, text text,
    payload text);
create table threads (id text primary key, name text, tip_message_hash text, forked_from text, datetime_utc text);
create table turns (id text primary key, thread_id text, parent_message_hash text, tip_message_hash text, model text,
    datetime_utc text);
create table responses (id text primary key, model text, prompt text, system text, response text, conversation_id text,
    datetime_utc text);
insert into attachments values ('t', 'text/plain', null, null, x'776f726473');
insert into fragments values (1, 'h', 'a fragment', '', null);
insert into messages values ('s', null, 'system', null), ('q', 's', 'user', null), ('a', 'q', 'assistant', null),
    ('r', 'a', 'tool', null), ('b', 'r', 'assistant', null), ('c', 'q', 'assistant', null);
insert into parts values (1, 's', 0, 'text', null, 'be brief', null),
    (2, 'q', 0, 'text', null, null, '{"text_ref": [{"fragment": 1}, {"literal": " and sum"}]}'),
    (3, 'q', 1, 'attachment', null, null, '{"attachment": {"id": "t"}}'),
    (4, 'a', 0, 'reasoning', null, 'hm', null),
    (5, 'a', 1, 'tool_call', 'add', null, '{"name": "add", "arguments": {"a": 1}, "tool_call_id": "k"}'),
    (6, 'r', 0, 'tool_result', 'add', null, '{"output": "3", "tool_call_id": "k"}'),
    (7, 'b', 0, 'text', null, 'it is 3', null), (8, 'c', 0, 'text', null, 'other', null);
insert into threads values ('th', 'Sum', 'b', null, '2026-01-01 00:00:00+00:00');
insert into turns values ('u1', 'th', 'q', 'c', 'm', '2026-01-01T00:00:00+00:00'),
    ('u2', 'th', 'q', 'a', 'm', '2026-01-01T00:01:00+00:00'), ('u3', 'th', 'r', 'b', 'm', '2026-01-01T00:02:00+00:00');
"""


def logs(tmp_path: Path, *scripts: str) -> Path:
    path = tmp_path / "logs.db"
    path.unlink(missing_ok=True)
    with sqlite3.connect(path) as connection:
        for script in scripts:
            connection.executescript(script)
    connection.close()
    return path


def said(stored: Stored) -> list[tuple[str, str]]:
    return [(node.role, node.text) for node in stored.tree.path()]


def test_llms_oldest_logs(tmp_path: Path) -> None:
    chat, alone = read(logs(tmp_path, OLD))
    assert said(chat) == [("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two")]
    assert (chat.settings.system, chat.model) == ("be brief", "gpt-3")
    assert said(alone) == [("user", "alone"), ("assistant", "three")]


def test_llms_conversations_before_and_after_attachments(tmp_path: Path) -> None:
    plain, alone = read(logs(tmp_path, MIDDLE))
    assert (plain.title, plain.model, plain.settings.system) == ("Greeting", "gpt-4", "be kind")
    assert said(plain)[:2] == [("user", "hi"), ("assistant", "hello")]
    assert plain.created_at == 1704067200.0
    assert said(alone) == [("user", "alone"), ("assistant", "x")]
    full, _ = read(logs(tmp_path, MIDDLE, EXTRAS))
    path = full.tree.path()
    assert said(full) == [
        ("user", "hi\n[image/png: https://example.com/a.png]"),
        ("assistant", "hello"),
        ("user", "sum"),
        ("assistant", ""),
        ("tool", "3"),
        ("assistant", "it is 3"),
    ]
    assert path[0].attachments == (Attachment("f.md", "a fragment"), Attachment("notes.txt", "words", "/x/notes.txt"))
    assert path[3].calls == (Call("k", "add", {"a": 1, "b": 2}),)
    assert (path[4].call_id, path[5].thought) == ("k", "hm")
    assert full.settings.system == "system part\n\nbe kind"


def test_llms_threads(store: Store, tmp_path: Path) -> None:
    path = logs(tmp_path, NEW)
    (found,) = read(path)
    nodes = found.tree.path()
    assert said(found) == [("user", "a fragment and sum"), ("assistant", ""), ("tool", "3"), ("assistant", "it is 3")]
    assert (found.title, found.model, found.settings.system) == ("Sum", "m", "be brief")
    assert nodes[0].attachments == (Attachment("attachment", "words"),)
    assert (nodes[1].thought, nodes[1].calls) == ("hm", (Call("k", "add", {"a": 1}),))
    assert [node.text for node in found.tree.siblings(nodes[1].id)] == ["other", ""]
    assert bring_in(store, path) == Imported(new=1)
    assert bring_in(store, path) == Imported(unchanged=1)


@pytest.mark.parametrize(
    "script",
    [
        "create table recipes (a)",
        "create view responses as select 1 as prompt, 2 as response",
        "create table responses (prompt, response); insert into responses values (x'ff', 5), (null, null)",
        "create table turns (a); create table threads (b); create table messages (c); create table parts (d);"
        "insert into threads values (1)",
        "create table messages (hash, parent_hash, role);"
        "insert into messages values ('a', 'b', 'user'), ('b', 'a', 'user');"
        "create table parts (message_hash, position, type, text, payload); create table threads (id, tip_message_hash);"
        "create table turns (id, thread_id, tip_message_hash); insert into threads values (1, 'a')",
    ],
    ids=["foreign", "view", "odd values", "missing columns", "circle"],
)
def test_strange_logs_are_read_or_refused(store: Store, tmp_path: Path, script: str) -> None:
    path = logs(tmp_path, script)
    with contextlib.suppress(FormatError):
        bring_in(store, path)
        return
    assert store.list() == []


# Our own


def full() -> Stored:
    asked = Node("user", "1+1?\n\ud83c", attachments=(Attachment("a.py", "```\nx", "a.py", 3),), created_at=3.0)
    answer = Node("assistant", "2", parent=asked.id, thought="a\n\nb", thought_s=0.5, model="m", finish="tools")
    answer.figures, answer.calls, answer.created_at = {"n": 1.5}, (Call("k", "add", {"a": [1]}),), 4.0
    result = Node("tool", "# 3\n````", parent=answer.id, call_id="k", created_at=5.0)
    other = Node("assistant", "two", parent=asked.id, finish="edited", created_at=6.0)
    settings = Settings("Sys", Sampling(temperature=0.1, seed=3), 5, "on")
    return Stored("id1", "Ünï", Tree([asked, answer, result, other], result.id), settings, "m", "ad", True, 1.0, 7.0)


def test_what_was_exported_comes_back_whole(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(to_json(full()), encoding="utf-8")
    assert bring_in(store, path) == Imported(new=1)
    assert bring_in(store, path) == Imported(unchanged=1)
    found, given = store.load("id1"), full()
    nodes = list(given.tree)
    nodes[0].text = "1+1?\n\ufffd"
    for node, back in zip(nodes, found.tree, strict=True):
        node.id, node.parent = back.id, back.parent
    assert list(found.tree) == nodes
    assert found.tree.path()[-1].text == "# 3\n````"
    assert [
        getattr(found, n) for n in ("title", "settings", "model", "adapter", "pinned", "created_at", "updated_at")
    ] == [getattr(given, n) for n in ("title", "settings", "model", "adapter", "pinned", "created_at", "updated_at")]
    both = tmp_path / "list.json"
    both.write_text(f"[{to_json(found)}]", encoding="utf-8")
    assert bring_in(store, both) == Imported(unchanged=1)


def test_markdown_of_the_branch_that_is_shown() -> None:
    text = to_markdown(full(), thoughts=True)
    assert text.startswith(
        "# Ünï\n\nm · 1970-01-01 00:00 UTC\n\n## System\n\nSys\n\n## You\n\na.py:\n\n````\n```\nx\n````"
    )
    assert "> a\n>\n> b\n\n2\n\nUses add:\n\n```json\n" in text
    assert "## Tool\n\n`````\n# 3\n````\n`````\n" in text
    assert "two" not in text
    assert "> a" not in to_markdown(full())
    text.encode()


# Broken and hostile


def refused(store: Store, path: Path, *words: str) -> None:
    with pytest.raises(EdgeR1Error) as caught:
        bring_in(store, path)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.list() == []


GOOD = json.dumps(SIMPLE)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"   ",
        b"null",
        b"[]",
        b"{}",
        b"[1, 2]",
        b"hello",
        b"\xff\xfe\x00",
        f"[{GOOD}".encode(),
        f"[{GOOD},".encode(),
        f"[{GOOD},{GOOD[:-30]}".encode(),
        f"[{GOOD} {GOOD}]".encode(),
        f"[{GOOD}] x".encode(),
        f"[{GOOD}, 5]".encode(),
        f'[{GOOD}, {{"mapping": []}}]'.encode(),
        b"[" * 100_000,
        b'[{"mapping": ' + b"[" * 100_000,
        b"[" + b"9" * 100_000 + b"]",
        b'{"format": "edger1-conversation", "version": 99, "id": "x"}',
        b'{"format": "edger1-conversation", "version": 1, "id": "x", "messages": [{"id": "a", "role": "god"}]}',
        b'{"format": "edger1-conversation", "version": 1, "id": 5}',
        b"PK\x03\x04broken",
        b"SQLite format 3\x00broken",
        GOOD.encode("utf-16"),
    ],
    ids=lambda content: ascii(content[:24]),
)
def test_a_broken_file_changes_nothing(store: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken"
    path.write_bytes(content)
    refused(store, path, "broken")


def test_what_cannot_be_read_at_all(store: Store, tmp_path: Path) -> None:
    refused(store, tmp_path / "nowhere.json", "nowhere.json", "no such file")
    refused(store, tmp_path, "directory")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "x")
    refused(store, tmp_path / "other.zip", "conversations.json")
    damaged = io.BytesIO()
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", json.dumps([SIMPLE] * 20))
    content = bytearray(damaged.getvalue())
    content[60:90] = b"\x55" * 30
    (tmp_path / "damaged.zip").write_bytes(content)
    refused(store, tmp_path / "damaged.zip", "damaged.zip")


def test_a_small_archive_that_unpacks_to_one_endless_value(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "LARGEST_CHARACTERS", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", '["' + "a" * (20 << 20) + '"]')
    refused(store, tmp_path / "bomb.zip", "longer than")


def test_a_large_file_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    one = json.dumps(conversation(*((str(at), None, message("user", "x" * 10_000)) for at in range(5))))
    with path.open("w") as file:
        file.write("[" + ",\n".join([one] * 200) + "]")
    assert path.stat().st_size > 9 << 20
    tracemalloc.start()
    assert sum(1 for _ in read(path)) == 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6 << 20


@given(st.lists(JSON, max_size=5), st.integers(1, 7), st.sampled_from(["", " ", "\n\t "]))
def test_values_are_those_of_the_file_however_it_is_cut(found: list[Any], chunk: int, blank: str) -> None:
    text = blank + "[" + blank + f"{blank},{blank}".join(map(json.dumps, found)) + blank + "]" + blank
    before, json_stream.CHUNK = json_stream.CHUNK, chunk
    try:
        back = list(json_stream.values(io.StringIO(text), "here"))
    finally:
        json_stream.CHUNK = before
    assert json.dumps(back) == json.dumps(found)


@given(st.integers(0, len(GOOD) + 1))
def test_a_file_that_is_cut_off_anywhere_is_refused(cut: int) -> None:
    with pytest.raises(FormatError):
        list(json_stream.values(io.StringIO(f"[{GOOD}]"[:cut]), "here"))
