"""Conversations on disk: what is written is there again, whatever happened in between."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from children import join
from hypothesis import given
from hypothesis import strategies as st

from edger1 import paths
from edger1.errors import StoreError
from edger1.messages import Sampling
from edger1.tui.settings import Settings
from edger1.tui.store import Store, Stored
from edger1.tui.store import store as store_module
from edger1.tui.tree import Attachment, Call, Node, Tree

PLAIN = Settings()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conversations.db"


@pytest.fixture
def store(path: Path) -> Store:
    return Store.open(path)


def talk(store: Store, *texts: str, title: str | None = None) -> tuple[str, list[Node]]:
    """A conversation with these messages, the user's first."""
    id_ = store.create(model="nano", settings=PLAIN, title=title)
    nodes: list[Node] = []
    for at, text in enumerate(texts):
        node = Node(
            "user" if at % 2 == 0 else "assistant",
            text,
            parent=nodes[-1].id if nodes else None,
            finish="stop" if at % 2 else None,
        )
        store.add(id_, node)
        nodes.append(node)
    return id_, nodes


def test_everything_of_a_conversation_comes_back(path: Path) -> None:
    store = Store.open(path)
    settings = Settings("be brief", Sampling(temperature=0.5), 100, "off")
    id_ = store.create(model="nano", adapter="runs/a", settings=settings, title="Sums")
    asked = Node("user", "1 + 1?", attachments=(Attachment("a.py", "x = 1", "src/a.py", 4), Attachment("paste", "y")))
    store.add(id_, asked)
    answer = Node("assistant", parent=asked.id, model="nano")
    store.add(id_, answer)
    store.append(answer.id, thought="let me ")
    store.append(answer.id, thought="see")
    store.append(answer.id, "tw")
    store.append(answer.id, "o")
    answer.text, answer.thought, answer.thought_s, answer.finish = "two", "let me see", 1.5, "tools"
    answer.figures, answer.calls = {"finish_reason": "stop", "n": 2}, (Call("c1", "add", {"a": [1, None]}),)
    store.finish(answer)
    result = Node("tool", "2", parent=answer.id, call_id="c1")
    store.add(id_, result)
    other = Node("assistant", "deux", parent=asked.id, finish="edited")
    store.add(id_, other)
    store.close()

    found = Store.open(path).load(id_)
    assert (found.title, found.model, found.adapter, found.settings) == ("Sums", "nano", "runs/a", settings)
    assert list(found.tree) == [asked, answer, result, other]
    assert found.tree.head == other.id


def test_a_message_whose_program_died_is_read_back_from_its_pieces(path: Path) -> None:
    store = Store.open(path)
    id_, (asked,) = talk(store, "why?")
    answer = Node("assistant", parent=asked.id)
    store.add(id_, answer)
    for piece in ("Be", "cause ", "of \ud83d"):
        store.append(answer.id, piece, thought="h")
    found = Store.open(path).load(id_).tree[answer.id]
    assert (found.text, found.thought, found.finish) == ("Because of \ufffd", "hhh", None)


def test_a_dead_answer_becomes_searchable_and_a_live_one_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(path)
    id_, (asked,) = talk(store, "why?")
    answer = Node("assistant", parent=asked.id)
    store.add(id_, answer)
    store.append(answer.id, "Because of ")
    monkeypatch.setattr(store_module, "STALE_S", -1.0)
    window = Store.open(path)
    assert [hit.node for hit in window.search("because")] == [answer.id]
    store.append(answer.id, "gravity")
    assert window.load(id_).tree[answer.id].text == "Because of gravity"
    answer.text, answer.finish = "Because of gravity.", "stop"
    store.finish(answer)
    assert window.load(id_).tree[answer.id].text == "Because of gravity."
    assert [hit.node for hit in window.search("gravity")] == [answer.id]
    assert check_index(path)


def check_index(path: Path) -> bool:
    """The index says of each word what the messages say."""
    from edger1.tui.store.search import indexed

    connection = sqlite3.connect(path)
    fresh = sqlite3.connect(":memory:")
    (sql,) = connection.execute("select sql from sqlite_master where name = 'message_index'").fetchone()
    fresh.execute(sql)
    for seq, text, thought in connection.execute("select seq, text, thought from messages"):
        if text or thought:
            fresh.execute(
                "insert into message_index (rowid, text, thought) values (?, ?, ?)",
                (seq, indexed(text), indexed(thought)),
            )
    for each in (connection, fresh):
        each.execute("create virtual table temp.words using fts5vocab(main, message_index, instance)")
    ask = "select term, doc, col, offset from temp.words order by 1, 2, 3, 4"
    return connection.execute(ask).fetchall() == fresh.execute(ask).fetchall()


def test_the_list_is_newest_first_and_without_what_was_deleted(store: Store) -> None:
    first, _ = talk(store, "  what\nis\ta prime?  ")
    second, _ = talk(store, "hi", "hello", title="Greeting")
    third, _ = talk(store)
    assert [each.id for each in store.list()] == [third, second, first]
    store.delete(third)
    store.pin(first, True)
    store.add(first, Node("assistant", "x", parent=store.load(first).tree.head, finish="stop"))
    assert [(each.id, each.pinned, each.message_count) for each in store.list()] == [
        (first, True, 2),
        (second, False, 2),
    ]
    assert [each.name for each in store.list()] == ["what is a prime?", "Greeting"]
    assert [each.id for each in store.list(limit=1)] == [first]
    store.undelete(third)
    assert third in {each.id for each in store.list()}
    assert [each.id for each in store.untitled()] == [first]
    store.rename(first, "  Primes \n again ")
    assert store.load(first).title == "Primes again"
    assert store.untitled() == []
    store.rename(first, "")
    assert [each.id for each in store.untitled()] == [first]


def test_a_branch_and_whom_it_is_with_are_remembered(store: Store) -> None:
    id_, nodes = talk(store, "a", "b", "c")
    store.set_head(id_, nodes[1].id)
    store.set_settings(id_, Settings("x"))
    store.set_model(id_, "other", None)
    found = store.load(id_)
    assert [node.text for node in found.tree.path()] == ["a", "b"]
    assert (found.settings.system, found.model) == ("x", "other")


def test_search_finds_titles_messages_and_thoughts(store: Store) -> None:
    id_, nodes = talk(store, "Tell me of Äpfel", "They grow", title="Fruit: apples")
    answer = Node("assistant", "Red", parent=nodes[-1].id, thought="Cider comes of apples", finish="stop")
    store.add(id_, answer)
    hits = store.search("appl")
    assert [(hit.node, hit.role, hit.title) for hit in hits] == [
        (None, "title", "Fruit: apples"),
        (answer.id, "assistant", "Fruit: apples"),
    ]
    assert [hit.snippet[begin:end] for hit in hits for begin, end in hit.marks] == ["appl", "appl"]
    assert [hit.node for hit in store.search("apf")] == [nodes[0].id]
    assert [hit.node for hit in store.search("cider appl")] == [answer.id]
    assert store.search("cider pears") == []
    store.delete(id_)
    assert store.search("appl") == []
    store.undelete(id_)
    store.rename(id_, "Pears")
    assert [hit.node for hit in store.search("appl")] == [answer.id]
    assert [hit.node for hit in store.search("pea")] == [None]


@pytest.mark.parametrize(
    ("text", "words", "marked"),
    [
        ("我想学习编程语言", "编程", ["编程"]),
        ("東京タワーへ行く", "タワー", ["タワー"]),
        ("สวัสดีชาวโลก", "ชาว", ["ชาว"]),
        ("서울에서 만나요", "서울", ["서울"]),
        ("well done 🎉🎉 you", "🎉", ["🎉🎉"]),
        ("NAÏVE Café", "naive caf", ["NAÏVE", "Caf"]),
        ("Straße und Weg", "str", ["Str"]),
        ("call os.path.join now", "path.jo", ["path.jo"]),
        ('he said "go on" twice', '"go on"', ["go on"]),
        ("x += 1; y ++", "++", ["++"]),
        ("snake_case_name", "case", ["case"]),
    ],
)
def test_search_in_any_script(store: Store, text: str, words: str, marked: list[str]) -> None:
    talk(store, text)
    (hit,) = store.search(words)
    assert [hit.snippet[begin:end] for begin, end in hit.marks] == marked


def test_quoted_words_are_whole_words(store: Store) -> None:
    talk(store, "the quick brown fox")
    assert len(store.search('"quick brown"')) == 1
    assert store.search('"quick bro"') == []
    assert store.search('"brown quick"') == []


STRANGE = ['"', '""', "'", "*", "a*", "NEAR(a b)", "a AND", "OR", "-a", "text:a", "^a", "(", "%", "_", "+-*/", "{a b}"]
STRANGE += [
    "\x00",
    "a\x00b",
    "\ud800",
    "",
    " ",
    "a" * 10_000,
    "a " * 10_000,
    "😀",
    "👩\u200d👩",
    "\ufe0f",
    "²",
    "\ue000",
]


@pytest.mark.parametrize("words", STRANGE, ids=ascii)
def test_any_input_is_a_query(store: Store, words: str) -> None:
    talk(store, "nothing of the kind")
    store.search(words)


@given(st.text(max_size=60), st.text(max_size=30))
def test_what_was_written_is_found_by_any_of_its_words(text: str, other: str) -> None:
    from edger1.tui.store.search import fold, parse, snippet

    assert len(fold(text)) == len(text)
    query = parse(other)
    line, marks = snippet(text, query.patterns)
    assert "\n" not in line
    assert all(0 <= begin < end <= len(line) for begin, end in marks)
    assert marks == sorted(marks)
    memory = sqlite3.connect(":memory:")
    memory.execute("create virtual table t using fts5(a, tokenize = \"unicode61 categories 'L* N* Co So'\")")
    if query.match:
        memory.execute("select 1 from t where t match ?", (query.match,)).fetchall()


def test_a_hit_is_one_line_without_what_a_terminal_obeys(store: Store) -> None:
    talk(store, "x " * 300 + "\x1b[31m needle\x1b[0m\r\nin\tthe\u202ehay " + "y " * 300)
    (hit,) = store.search("needle")
    assert hit.snippet.isprintable()
    assert hit.snippet.startswith("…")
    assert hit.snippet.endswith("…")
    assert len(hit.snippet) < 250
    assert [hit.snippet[begin:end] for begin, end in hit.marks] == ["needle"]


def test_one_conversation_does_not_fill_the_hits(store: Store) -> None:
    other, _ = talk(store, "word")
    long, _ = talk(store, *["word"] * 60)
    hits = store.search("word", limit=20)
    assert {hit.conversation for hit in hits} == {other, long}
    assert len(store.search("word", limit=3)) == 3


def test_drafts_history_and_approvals_outlive_the_program(path: Path) -> None:
    store = Store.open(path)
    id_, _ = talk(store, "a")
    store.save_draft(None, "new one")
    store.save_draft(id_, "unsent", (Attachment("a", "b"),))
    for text in ("one", "two", "two", "  ", "three"):
        store.remember(text)
    store.approve_always("files.read")
    store.approve_always("files.write")
    store.approve_always("files.write")
    store.forget_approval("files.read")
    store.close()
    store = Store.open(path)
    assert store.draft(None) == ("new one", ())
    assert store.draft(id_) == ("unsent", (Attachment("a", "b"),))
    assert store.history() == ["one", "two", "three"]
    assert store.history(limit=1) == ["three"]
    assert store.approvals() == {"files.write"}
    store.save_draft(id_, "")
    assert store.draft(id_) == ("", ())


def test_deleted_for_good_after_thirty_days(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(path)
    old, (asked,) = talk(store, "old words", title="Old title")
    store.append(asked.id, "piece")
    kept, _ = talk(store, "kept words")
    recent, _ = talk(store, "recent words")
    store.delete(old)
    store.delete(recent)
    store.close()
    sqlite3.connect(path).executescript(
        f"update conversations set deleted_at = deleted_at - {31 * 86400} where id = '{old}'"
    )
    store = Store.open(path)
    with pytest.raises(StoreError, match="no conversation"):
        store.load(old)
    store.undelete(recent)
    assert {each.id for each in store.list()} == {kept, recent}
    assert store.search("old") == []
    assert check_index(path)


def test_what_is_not_there_is_said(store: Store) -> None:
    id_, (node,) = talk(store, "a")
    for wrong in (
        lambda: store.load("nobody"),
        lambda: store.rename("nobody", "x"),
        lambda: store.add("nobody", Node("user", "x")),
        lambda: store.add(id_, Node("user", "x", parent="nobody")),
        lambda: store.append("nobody", "x"),
        lambda: store.finish(Node("user", "x")),
        lambda: store.add(id_, node),
    ):
        with pytest.raises(StoreError):
            wrong()
    assert len(store.load(id_).tree) == 1
    store.close()
    with pytest.raises(StoreError):
        store.list()


def test_a_conversation_that_could_not_be_saved_is_saved_again_whole(store: Store) -> None:
    asked = Node("user", "why?")
    answer = Node("assistant", "So.", parent=asked.id, finish="stop")
    stored = Stored("c1", None, Tree([asked, answer]), PLAIN, "nano", created_at=5.0, updated_at=6.0)
    assert store.insert(stored) == "new"
    assert store.insert(stored) == "unchanged"
    found = store.load("c1")
    assert list(found.tree) == [asked, answer]
    assert (found.created_at, found.updated_at) == (5.0, 6.0)
    stored.tree.add(Node("user", "and?", parent=answer.id))
    assert store.insert(stored) == "updated"
    store.delete("c1")
    assert store.insert(stored) == "updated"
    assert store.load("c1").tree.head == stored.tree.head
    forged = Stored("c1", None, Tree([Node("user", "forged", asked.id, finish="stop")]))
    assert store.insert(forged) == "unchanged"
    assert store.load("c1").tree[asked.id].text == "why?"
    copy = Stored("c2", "Copy", Tree(list(stored.tree), stored.tree.head))
    assert store.insert(copy) == "new"
    assert store.insert(copy) == "unchanged"
    assert [node.text for node in store.load("c2").tree.path()] == ["why?", "So.", "and?"]
    assert [node.text for node in store.load("c1").tree.path()] == ["why?", "So.", "and?"]


def test_a_store_may_be_used_from_any_thread(store: Store) -> None:
    id_, nodes = talk(store, "a")
    errors: list[Exception] = []

    def work(name: str) -> None:
        try:
            node = Node("assistant", parent=nodes[0].id)
            store.add(id_, node)
            for at in range(50):
                store.append(node.id, f"{name}{at} ")
                store.search("a")
                store.load(id_)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in "xyz"]
    for thread in threads:
        thread.start()
    join(*threads)
    assert errors == []
    texts = sorted(node.text for node in store.load(id_).tree if node.role == "assistant")
    assert texts == ["".join(f"{name}{at} " for at in range(50)) for name in "xyz"]


def test_two_thousand_messages_load_at_once(store: Store) -> None:
    """Loading costs by the message and writing does not; the bounds in seconds are generous, for any machine."""
    loads, writes = {}, {}
    for count in (100, 2000):
        nodes = [Node("user", "word " * 100)]
        for at in range(count - 1):
            role = "assistant" if at % 2 == 0 else "user"
            nodes.append(Node(role, "word " * 100, parent=nodes[-1].id, finish="stop"))
        id_, last = f"of {count}", nodes[-1].id
        store.insert(Stored(id_, None, Tree(nodes)))
        loads[count] = min(timed(partial(store.load, id_)) for _ in range(5))
        assert len(store.load(id_).tree) == count
        new = [Node("user", "word " * 100, parent=last) for _ in range(50)]
        writes[count] = sorted(timed(partial(store.add, id_, node)) for node in new)[25]
    assert loads[2000] < min(3 * 20 * loads[100], 1.0)
    assert writes[2000] < min(5 * writes[100], 0.05)


def timed(work: Callable[[], object]) -> float:
    """Seconds of the processor: these machines are shared."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def test_the_file_lies_in_the_data_folder() -> None:
    Store.open().close()
    assert (paths.data() / "conversations.db").is_file()
