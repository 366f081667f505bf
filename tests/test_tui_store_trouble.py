"""The conversations' file when it is damaged, newer, locked away or full, and with several windows open."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import pytest
from children import child, join, until

from edger1.errors import StoreError
from edger1.tui.settings import Settings
from edger1.tui.store import Store, migrations, opening
from edger1.tui.tree import Node

PROCESS = Path(__file__).with_name("store_process.py")
NOBODY = 65534


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "conversations.db"


def begun(path: Path, text: str = "hello") -> tuple[str, Node]:
    store = Store.open(path)
    id_ = store.create(model="nano", settings=Settings(), title="Kept")
    node = Node("user", text)
    store.add(id_, node)
    store.close()
    return id_, node


def works(store: Store) -> None:
    id_ = store.create(model="nano", settings=Settings())
    node = Node("user", "a new beginning")
    store.add(id_, node)
    store.append(node.id, "!")
    assert store.load(id_).tree[node.id].text == "a new beginning!"
    assert [hit.node for hit in store.search("begin")] == [node.id]


# Newer


def test_a_newer_database_is_read_and_never_written(path: Path) -> None:
    id_, node = begun(path)
    with sqlite3.connect(path) as connection:
        connection.execute("insert into migrations values ('of_the_future', 1)")
    connection.close()
    before = path.read_bytes()
    store = Store.open(path)
    assert store.read_only
    assert len(store.notices) == 1
    assert "newer EdgeR1" in store.notices[0]
    assert store.load(id_).tree[node.id].text == "hello"
    assert [each.id for each in store.list()] == [id_]
    assert [hit.node for hit in store.search("hel")] == [node.id]
    for write in (
        lambda: store.create(model="m", settings=Settings()),
        lambda: store.add(id_, Node("user", "x")),
        lambda: store.append(node.id, "x"),
        lambda: store.finish(node),
        lambda: store.rename(id_, "x"),
        lambda: store.delete(id_),
        lambda: store.remember("x"),
    ):
        with pytest.raises(StoreError, match="newer"):
            write()
    store.close()
    assert path.read_bytes() == before


# Damaged


@pytest.mark.parametrize("kind", ["garbage", "truncated", "overwritten", "foreign"])
def test_a_damaged_file_is_kept_aside_and_a_new_one_begun(path: Path, kind: str) -> None:
    begun(path, "word " * 5000)
    whole = path.read_bytes()
    if kind == "garbage":
        path.write_bytes(b"not a database at all " * 1000)
    elif kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "overwritten":
        path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    else:
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("create table recipes (name)")
        connection.close()
    Path(f"{path}-wal").write_bytes(b"what was left")
    damaged = path.read_bytes()
    store = Store.open(path)
    (notice,) = store.notices
    assert "new one was begun" in notice
    (aside,) = path.parent.glob("conversations.damaged-20*.db")
    assert str(aside) in notice
    assert aside.read_bytes() == damaged or kind == "foreign"
    assert not store.read_only
    assert not store.in_memory
    works(store)
    store.close()
    again = Store.open(path)
    assert again.notices == []
    assert len(again.list()) == 1


def test_damage_in_the_same_second_loses_neither_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening.time, "strftime", lambda form: "2026-01-01-000000")
    for each in (b"first" * 500, b"second" * 500):
        path.write_bytes(each)
        Store.open(path).close()
    kept = {found.read_bytes() for found in path.parent.glob("*.damaged-*.db")}
    assert kept == {b"first" * 500, b"second" * 500}


def test_an_empty_file_is_a_new_database(path: Path) -> None:
    path.touch()
    store = Store.open(path)
    assert store.notices == []
    works(store)


def test_values_of_a_wrong_kind_and_letters_that_are_none_hide_nothing_else(path: Path) -> None:
    id_, _ = begun(path)
    store = Store.open(path)
    other = store.create(model="nano", settings=Settings(), title="Whole")
    store.add(other, Node("user", "whole"))
    odd = store.create(model="nano", settings=Settings())
    store.add(odd, Node("assistant", "odd", created_at=1.0))
    store.close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("update conversations set title = cast(x'4bff' as text) where id = ?", (id_,))
        connection.execute(
            "update conversations set title = x'ff', model = x'01', updated_at = 'x', created_at = 'y', settings = 3,"
            " head = 7 where id = ?",
            (odd,),
        )
        connection.execute(
            "update messages set text = x'61ff', thought = x'62', created_at = 'soon', thought_s = 'long', finish = 7,"
            " figures = '[]', attachments = 3, call_id = x'63' where role = 'assistant'"
        )
        connection.execute("insert into pieces (message, text, thought) select seq, x'ff', '' from messages")
        connection.commit()
    store = Store.open(path)
    assert {each.name for each in store.list()} == {"K\ufffd", "Whole", "\ufffd"}
    assert all(isinstance(each.updated_at, float) for each in store.list())
    assert store.load(other).tree.path()[0].text == "whole\ufffd"
    (found,) = store.load(odd).tree
    assert (found.text, found.thought, found.thought_s) == ("a\ufffd\ufffd", "b", 0.0)
    assert {hit.conversation for hit in store.search("whole")} == {other}
    assert [hit.conversation for hit in store.search("odd")] == [odd]
    works(store)


def test_damage_that_shows_only_later_is_an_error_with_advice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id_, _ = begun(path, "word " * 20_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: 20 * 4096] + b"\x00" * (len(whole) - 20 * 4096))
    monkeypatch.setattr(opening, "CHECKED_BYTES", 0)
    store = Store.open(path)
    with pytest.raises(StoreError, match=r"damaged.*Start EdgeR1 again"):
        store.load(id_)


# Not to be written


def test_a_folder_in_the_files_place(path: Path) -> None:
    path.mkdir()
    store = Store.open(path)
    assert store.in_memory
    assert "it is a folder" in store.notices[0]
    assert "in memory" in store.notices[0]
    works(store)
    assert list(path.iterdir()) == []


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "v1").write_text("x")
    store = Store.open(tmp_path / "v1" / "conversations.db")
    assert store.in_memory
    works(store)


def test_a_place_where_nothing_can_be_made() -> None:
    store = Store.open(Path("/proc/nothing/conversations.db"))
    assert store.in_memory
    works(store)


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder that anybody may enter; its tests run without root's rights."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        if os.geteuid() == NOBODY:
            os.seteuid(0)
        for found in folder.rglob("*"):
            found.chmod(0o755)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def without_rights() -> None:
    if os.geteuid() == 0:
        os.seteuid(NOBODY)


@pytest.mark.parametrize("locked", ["folder", "file", "both"])
def test_without_the_right_to_write_it_works_in_memory(as_nobody: Path, locked: str) -> None:
    path = as_nobody / "conversations.db"
    id_, node = begun(path)
    for found in as_nobody.iterdir():
        found.chmod(0o666)
    if locked in ("file", "both"):
        path.chmod(0o444)
    as_nobody.chmod(0o555 if locked in ("folder", "both") else 0o777)
    before = path.read_bytes()
    without_rights()
    store = Store.open(path)
    assert store.in_memory
    assert len(store.notices) == 1
    assert "cannot be written" in store.notices[0]
    assert store.load(id_).tree[node.id].text == "hello"
    store.rename(id_, "Changed")
    works(store)
    store.close()
    assert path.read_bytes() == before


def test_without_the_right_to_read_it_works_in_memory(as_nobody: Path) -> None:
    path = as_nobody / "conversations.db"
    begun(path)
    path.chmod(0o000)
    without_rights()
    store = Store.open(path)
    assert store.in_memory
    assert store.list() == []
    works(store)


def test_a_database_that_another_program_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(path)
    monkeypatch.setattr(opening, "BUSY_S", 0.05)
    store = Store.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin exclusive")
    with pytest.raises(StoreError, match="Another program"):
        store.remember("x")
    other.execute("rollback")
    store.remember("x")
    assert store.history() == ["x"]


# Full


def test_a_full_disk_is_said_and_loses_nothing_that_was_there(path: Path) -> None:
    id_, asked = begun(path)
    store = Store.open(path)
    connection = store._opened.writing.connection
    (pages,) = connection.execute("pragma page_count").fetchone()
    connection.execute(f"pragma max_page_count = {pages}")
    answer = Node("assistant", "long " * 5000, parent=asked.id, finish="stop")
    with pytest.raises(StoreError, match="disk is full"):
        store.add(id_, answer)
    assert [node.id for node in store.load(id_).tree] == [asked.id]
    connection.execute("pragma max_page_count = 1000000")
    stored = store.load(id_)
    stored.tree.add(answer)
    assert store.insert(stored) == "updated"
    assert store.load(id_).tree[answer.id].text == answer.text


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs a file system of its own")
def test_a_really_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(mount)], capture_output=True)
    if done.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        store = Store.open(mount / "conversations.db")
        id_ = store.create(model="m", settings=Settings())
        asked = Node("user", "q")
        store.add(id_, asked)
        answer = Node("assistant", parent=asked.id)
        store.add(id_, answer)
        written = itertools.count()

        def write_on() -> None:
            for _ in written:
                store.append(answer.id, "x" * 500)

        with pytest.raises(StoreError, match="disk is full"):
            write_on()
        assert store.load(id_).tree[answer.id].text == "x" * 500 * (next(written) - 1)
        store.close()
    finally:
        subprocess.run(["umount", str(mount)], check=False)


# Several windows


def test_windows_that_migrate_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(path)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, ("later", ("create table later (a)",))))
    stores: list[Store] = []
    threads = [threading.Thread(target=lambda: stores.append(Store.open(path)), daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    join(*threads)
    assert [store.notices for store in stores] == [[]] * 4
    assert [len(store.list()) for store in stores] == [1] * 4
    assert migrations.recorded(sqlite3.connect(path)) == {name for name, _ in migrations.MIGRATIONS}


def test_a_step_that_fails_leaves_the_database_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(path)
    bad = ("bad", ("create table half (a)", "create table half (a)"))
    connection = sqlite3.connect(path, isolation_level=None)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, bad))
    with pytest.raises(sqlite3.OperationalError):
        migrations.migrate(connection)
    assert connection.execute("select count(*) from sqlite_master where name = 'half'").fetchone() == (0,)
    assert "bad" not in (migrations.recorded(connection) or ())


def test_the_released_steps_are_as_they_were_released() -> None:
    """A database records only their names, so that changing one changes nothing for those who have it."""
    names = [name for name, _ in migrations.MIGRATIONS]
    assert names[:2] == ["conversations", "drafts_history_approvals"]
    assert len(set(names)) == len(names)


@contextmanager
def window(path: Path, conversation: str, parent: str, name: str, pieces: int) -> Iterator[tuple[Popen[str], Path]]:
    """Yield a second window that is ready, and the file that it writes to: nobody need read from it meanwhile."""
    command = [sys.executable, str(PROCESS), str(path), conversation, parent, name, str(pieces)]
    said = path.with_name(f"{name}.said")
    with said.open("w") as out, child(command, stdin=PIPE, stdout=out, stderr=out, text=True) as process:
        until(lambda: said.read_text().startswith("ready"), "a second window", process)
        yield process, said


def begin_writing(process: Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_windows_lose_nothing_and_wait_for_nobody(path: Path) -> None:
    id_, asked = begun(path)
    reader = Store.open(path)
    longest_read = 0.0
    with contextlib.ExitStack() as stack:
        windows = [stack.enter_context(window(path, id_, asked.id, name, 300)) for name in ("ann", "bob")]
        for process, _ in windows:
            begin_writing(process)
        while any(process.poll() is None for process, _ in windows):
            begin = time.perf_counter()
            reader.load(id_)
            reader.search("mess")
            longest_read = max(longest_read, time.perf_counter() - begin)
            time.sleep(0.05)
        assert [process.returncode for process, _ in windows] == [0, 0], [said.read_text() for _, said in windows]
    told = [json.loads(said.read_text().splitlines()[-1]) for _, said in windows]
    # A window that a busy machine holds up in a write holds up the other one, which may have had its time meanwhile.
    allowed_s = opening.BUSY_S / 2 + 2 * sum(said["held_up"] for said in told)
    assert longest_read < allowed_s
    found = reader.load(id_).tree
    for name, said in zip(("ann", "bob"), told, strict=True):
        assert said["pieces"] == 300
        assert found[said["answer"]].text == "".join(f"{name}{at} " for at in range(said["pieces"]))
        assert [node.id for node in reader.load(said["own"]).tree if node.text.startswith(name)] == said["added"]
        assert said["usual"] < 0.25
        assert said["longest"] < allowed_s
    assert reader._opened.writing.connection.execute("pragma integrity_check").fetchone() == ("ok",)


def test_a_killed_window_loses_nothing_that_was_said(path: Path) -> None:
    id_, asked = begun(path)
    with window(path, id_, asked.id, "ann", 10**6) as (killed, said):
        begin_writing(killed)
        until(lambda: said.read_text().count("\n") > 150, "150 pieces", killed)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    lines = said.read_text().splitlines()
    last = json.loads([line for line in lines if line.rstrip().endswith("}")][-1])
    store = Store.open(path)
    assert store.notices == []
    text = store.load(id_).tree[last["answer"]].text
    pieces = text.count(" ")
    assert pieces in (last["pieces"], last["pieces"] + 1)
    assert text == "".join(f"ann{at} " for at in range(pieces))
    works(store)
