"""Files as attachments: what is read, what is refused and in which words; walking, ranking, and what text means."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edger1.tui import attaching
from edger1.tui.attaching import AttachError, TooLargeError, measure, read, shown_name
from edger1.tui.fuzzy import positions, rank
from edger1.tui.mentions import Given, Mention, command_in, mention, mention_at, nearest, plain
from edger1.tui.recall import Recall, matches
from edger1.tui.walking import walk


def names(folder: Path, **options: object) -> list[str]:
    return [found.name for found in walk(folder, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_are_read_as_what_they_are(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("naïve 日本\r\nzwei\rdrei".encode(encoding))
    attached = read(tmp_path / "a.txt", root=tmp_path)
    assert attached.attachments[0].text == "naïve 日本\nzwei\ndrei"
    assert attached.attachments[0].name == "a.txt"
    assert attached.attachments[0].path == str(tmp_path / "a.txt")
    assert attached.notes == ()


def test_what_is_not_utf8_is_read_as_latin_1_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    attached = read(tmp_path / "a.txt", root=tmp_path)
    assert attached.attachments[0].text == "café"
    assert "read as Latin-1" in attached.notes[0]
    (tmp_path / "b.txt").write_bytes("“caf\xe9”".encode("cp1252"))
    attached = read(tmp_path / "b.txt", root=tmp_path)
    assert attached.attachments[0].text == "“café”"
    assert "Windows-1252" in attached.notes[0]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("r.pdf", b"%PDF-1.7\n%\xe2\xe3", ["a PDF document", "pdftotext r.pdf r.txt"]),
        ("r.docx", b"PK\x03\x04\x14\0", ["a Word document", "pandoc r.docx -o r.md"]),
        ("r.zip", b"PK\x03\x04\x14\0", ["a zip archive", "Unpack"]),
        ("r.png", b"\x89PNG\r\n\x1a\n\0", ["a PNG image"]),
        ("r.so", b"\x7fELF\x02\0", ["a compiled program", "source"]),
        ("r.db", b"SQLite format 3\0", ["SQLite", ".dump"]),
        ("r.bin", b"abc\0def", ["binary data"]),
        ("r.raw", bytes(range(1, 32)) * 9, ["binary data"]),
        ("u.txt", b"\xff\xfea\0b", ["UTF-16", "damaged"]),
    ],
)
def test_what_is_not_text_is_refused_with_what_would_do(
    tmp_path: Path, name: str, data: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AttachError) as refused:
        read(tmp_path / name, root=tmp_path)
    assert all(word in str(refused.value) for word in [name, *words])


def test_special_files_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "gone").symlink_to("nothing")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    began = time.monotonic()
    for name, words in {
        "pipe": "a pipe",
        "zero": "a device",
        "socket": "a socket",
        "circle": "circle",
        "gone": "There is no gone",
        "never": "There is no never",
    }.items():
        with pytest.raises(AttachError, match=words):
            read(tmp_path / name, root=tmp_path)
    with pytest.raises(AttachError, match="made up by the kernel"):
        read(Path("/proc/self/status"), root=tmp_path)
    # A pipe that is opened waits for ever, and a device never ends.
    assert time.monotonic() - began < 20
    listening.close()


def test_a_file_without_permission_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(attaching.os, "open", refuse)
    with pytest.raises(AttachError, match="no permission"):
        read(tmp_path / "a", root=tmp_path)


def test_a_huge_file_is_refused_and_cut_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "FILE_BYTES", 100)
    (tmp_path / "a.log").write_text("line é\n" * 50)
    with pytest.raises(TooLargeError, match="first 100 B of 400 B"):
        read(tmp_path / "a.log", root=tmp_path)
    attached = read(tmp_path / "a.log", root=tmp_path, cut=True)
    assert attached.attachments[0].text == "line é\n" * 12 + "[cut here: the first 100 B of 400 B]\n"
    assert "first 100 B" in attached.attachments[0].name
    assert "cut" in attached.notes[0]


def test_a_directory_gives_its_text_and_says_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "FILE_BYTES", 1000)
    src = tmp_path / "src"
    (src / "in" / "deep").mkdir(parents=True)
    (src / "__pycache__").mkdir()
    (tmp_path / "secret").write_text("not mine")
    for name, data in {
        ".gitignore": b"__pycache__/\n*.log\n!keep.log\n[z-a]\n",
        ".env": b"KEY=1",
        "a.py": b"a",
        "drop.log": b"x",
        "keep.log": b"k",
        "in/b.py": b"b",
        "in/.gitignore": b"c.py",
        "in/c.py": b"c",
        "in/deep/d.py": b"d",
        "pic.png": b"\x89PNG\0",
        "big.txt": b"x" * 2000,
        "__pycache__/a.pyc": b"\0",
    }.items():
        (src / name).write_bytes(data)
    (src / "loop").symlink_to(src)
    (src / "out").symlink_to(tmp_path / "secret")
    attached = read(src, root=tmp_path)
    taken = ["src/a.py", "src/keep.log", "src/in/b.py", "src/in/deep/d.py"]
    assert [each.name for each in attached.attachments] == taken
    notes = " ".join(attached.notes)
    assert "not text: pic.png" in notes
    assert "larger than 1.00 kB: big.txt" in notes
    assert "lead out of it: out" in notes
    assert measure(src).files >= 4


def test_a_directory_over_the_limits_is_refused_and_cut_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attaching, "FILES", 3)
    for number in range(5):
        (tmp_path / f"{number}.txt").write_text("x")
    assert measure(tmp_path).more
    with pytest.raises(TooLargeError, match="first 3 files"):
        read(tmp_path, root=tmp_path.parent)
    attached = read(tmp_path, root=tmp_path.parent, cut=True)
    assert len(attached.attachments) == 3
    assert "cut" in attached.notes[0]


def test_a_directory_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="no files of text"):
        read(tmp_path, root=tmp_path.parent)


@given(st.binary(max_size=400))
def test_any_bytes_are_text_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.bin"
    path.write_bytes(data)
    try:
        attached = read(path, root=path.parent)
    except AttachError:
        return
    text = attached.attachments[0].text
    text.encode("utf-8")
    assert "\0" not in text or data[:2] in (b"\xff\xfe", b"\xfe\xff", b"\0\0")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200))
def test_text_in_utf8_is_read_as_written(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    try:
        attached = read(path, root=path.parent)
    except AttachError:
        assert any(ord(each) < 32 or ord(each) == 127 for each in text) or text[:2] in ("MZ", "PK")
    else:
        assert attached.attachments[0].text == text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
        assert attached.notes == ()


def test_names_are_relative_and_safe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "work"
    assert shown_name(root / "a" / ".." / "b", root) == "b"
    assert shown_name(Path("b"), root) == "b"
    assert shown_name(tmp_path / "home" / "x", root) == "~/x"
    assert shown_name(tmp_path / "y", root) == str(tmp_path / "y")
    assert shown_name(root, root) == "work"
    assert shown_name(root / "a\x1b[2J\nb", root) == "a[2J?b"


def test_a_walk_obeys_the_repository_above_and_its_bounds(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("/sub/no.txt\nbuild\n")
    sub = tmp_path / "sub"
    (sub / "build").mkdir(parents=True)
    for name in ("no.txt", "yes.txt", "build/x", ".hidden"):
        (sub / name).write_text("")
    assert names(sub) == ["yes.txt"]
    assert names(sub, hidden=True) == [".hidden", "yes.txt"]
    assert len(names(tmp_path, entries_max=1)) == 1
    assert names(tmp_path, stop=lambda: True) == []
    assert names(tmp_path, seconds_max=-1) == []
    assert names(tmp_path / "never") == []


def test_ranking_prefers_what_a_person_means() -> None:
    files = ["tests/test_prompt.py", "edger1/train/prompts.py", "tui/widgets/prompt.py", "pyproject.toml", "README.md"]
    assert files[rank("prompt", files, 5)[0]] in ("edger1/train/prompts.py", "tui/widgets/prompt.py")
    assert files[rank("readme", files, 5)[0]] == "README.md"
    assert files[rank("w/prompt", files, 5)[0]] == "tui/widgets/prompt.py"
    assert rank("zzz", files, 5) == []
    assert rank("", files, 2) == [0, 1]


def test_ranking_takes_no_longer_for_a_hostile_folder() -> None:
    files = ["a" * 200 + str(number) for number in range(20_000)]
    began = time.process_time()
    rank("a" * 30 + "b", files, 50)
    rank("a" * 30, files, 50)
    assert time.process_time() - began < 1


@given(st.text(max_size=6), st.text(max_size=30))
def test_positions_spell_the_query(query: str, name: str) -> None:
    places = positions(query, name)
    assert places == sorted(set(places))
    if places and len(name.lower()) == len(name) and len(query.lower()) == len(query):
        assert "".join(name[place] for place in places).lower() == query.lower()
    assert set(rank(query, [name], 1)) <= {0}


@pytest.mark.parametrize("text", ["a@b.c", "mail me@", "x", "@a b", '@"a b" c'])
def test_these_name_no_file(text: str) -> None:
    assert mention_at(text) is None


@given(st.text(alphabet=st.characters(exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), min_size=1))
def test_a_name_is_found_again_as_it_is_quoted(name: str) -> None:
    said = mention(name)
    opened = said if not said.endswith('"') else said[:-1]
    assert mention_at(f"see {opened}") == Mention(4, name)
    assert mention_at(f"see {said} ") is None


def test_commands_are_told_from_text() -> None:
    assert command_in("/") == Given("", None)
    assert command_in("/adapter") == Given("adapter", None)
    assert command_in("/adapter runs/a b") == Given("adapter", "runs/a b")
    assert command_in("//x") is None
    assert command_in("what /x") is None
    assert plain("//etc is a folder") == "/etc is a folder"
    assert plain("a//b") == "a//b"
    assert nearest("adaptor", ["model", "adapter"]) == "adapter"
    assert nearest("qqq", ["model"]) is None


def test_history_walks_by_what_was_begun_and_gives_the_draft_back() -> None:
    walk = Recall(["fix a", "say b", "fix c", "fix c"], "fix")
    assert [walk.step(1) for _ in range(3)] == ["fix c", "fix a", None]
    assert [walk.step(-1) for _ in range(3)] == ["fix c", "fix", None]
    assert matches(["Fix the Bug", "x", "bug fix", "x"], "FIX bug", 9) == ["bug fix", "Fix the Bug"]
    assert matches(["a", "a", "b"], "", 9) == ["b", "a"]
