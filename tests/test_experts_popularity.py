"""Counts of experts' uses beside the model: kept over runs, ignored where they cannot be right, never half written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from children import child

from edger1 import paths
from edger1.experts import popularity
from edger1.experts.popularity import NAME, Popularity

SHAPE = (4, 6)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    return made


def used(folder: Path, *calls: tuple[int, list[int]]) -> Popularity:
    found = Popularity(folder, SHAPE)
    for layer, experts in calls:
        found.add(layer, experts)
    return found


def test_the_next_run_knows_what_this_one_used(folder: Path) -> None:
    assert not Popularity(folder, SHAPE).known
    run = used(folder, (0, [1, 3]), (0, [1]), (1, [5]))
    run.add(1, [0, 2, 2, 0, 0, 2, 2])
    assert run.counts(0).tolist() == [0, 2, 0, 1]
    assert run.save() == folder / NAME
    again = Popularity(folder, SHAPE)
    assert again.known
    assert again.counts(0) == pytest.approx([0, 2, 0, 1], abs=0.01)
    assert again.counts(1) == pytest.approx([3, 0, 4, 0, 0, 1], abs=0.01)


def test_saving_twice_counts_once(folder: Path) -> None:
    run = used(folder, (0, [2]))
    run.save()
    assert run.save() is None
    run.add(0, [3])
    run.save()
    assert Popularity(folder, SHAPE).counts(0) == pytest.approx([0, 0, 1, 1], abs=0.01)
    assert run.counts(0) == pytest.approx([0, 0, 1, 1], abs=0.01)


def test_old_use_counts_less(folder: Path) -> None:
    run = Popularity(folder, SHAPE)
    run.add(0, [0] * 4000)
    run.save()
    run = Popularity(folder, SHAPE)
    run.add(0, [1] * int(popularity.HALF_LIFE) * 4)
    run.save()
    assert Popularity(folder, SHAPE).counts(0) == pytest.approx([2000, 4000, 0, 0])


def test_nothing_used_writes_nothing(folder: Path) -> None:
    assert Popularity(folder, SHAPE).save() is None
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"null",
        b"[]",
        b"{}",
        b'{"version": 2, "counts": [[1,1,1,1],[1,1,1,1,1,1]]}',
        b'{"version": 1, "counts": [[1,1,1,1]]}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1]]}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1,1,1,-1]]}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1,1,1,NaN]]}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1,1,1,1e999]]}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1,1,1,"1"]]}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1,1,1,true]]}',
        b'{"version": 1, "counts": {"0": [1,1,1,1]}}',
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1,1,1,1' + b"0" * 5000 + b"]]}",
        b'{"version": 1, "counts": [[1,1,1,1],[1,1,1',
    ],
)
def test_what_is_damaged_or_foreign_is_ignored_and_rewritten(folder: Path, content: bytes) -> None:
    (folder / NAME).write_bytes(content)
    run = used(folder, (0, [1]))
    assert run.counts(0).tolist() == [0, 1, 0, 0]
    assert run.counts(1).tolist() == [0] * 6
    run.save()
    assert json.loads((folder / NAME).read_text())["counts"] == [[0, 1, 0, 0], [0] * 6]


def test_a_file_too_large_to_be_one_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used(folder, (0, [1])).save()
    monkeypatch.setattr(popularity, "MAX_FILE_BYTES", 10)
    assert not Popularity(folder, SHAPE).known


def test_a_folder_that_cannot_be_written_to_has_its_counts_in_the_data_folder(
    folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used(folder, (0, [1])).save()
    write = popularity.write_atomically

    def refuse(path: Path, text: str) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        write(path, text)

    monkeypatch.setattr(popularity, "write_atomically", refuse)
    saved = used(folder, (0, [2])).save()
    assert saved is not None
    assert saved.is_relative_to(home)
    assert Popularity(folder, SHAPE).counts(0) == pytest.approx([0, 1, 1, 0], abs=0.01)
    # Writable again: one file is left, with everything in it.
    monkeypatch.setattr(popularity, "write_atomically", write)
    assert used(folder, (0, [3])).save() == folder / NAME
    assert not saved.exists()
    assert Popularity(folder, SHAPE).counts(0) == pytest.approx([0, 1, 1, 1], abs=0.01)


def test_nowhere_to_write_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EDGER1_HOME", str(blocked))
    run = used(blocked / "model", (0, [1]))
    assert run.save() is None
    assert run.counts(0).tolist() == [0, 1, 0, 0]


def test_models_of_the_same_name_have_counts_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("one", "two"):
        (tmp_path / place / "model").mkdir(parents=True)
    monkeypatch.setattr(popularity.paths, "assets", lambda: tmp_path)
    used(tmp_path / "one" / "model", (0, [1])).save()
    assert not Popularity(tmp_path / "two" / "model", SHAPE).known


def test_what_comes_with_the_program_is_not_written_to() -> None:
    packaged = paths.assets() / "nano-moe"
    saved = used(packaged, (0, [1])).save()
    assert saved is not None
    assert not saved.is_relative_to(packaged)
    assert Popularity(packaged, SHAPE).known


def test_programs_that_save_at_once_leave_a_whole_file(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from edger1.experts.popularity import Popularity\n"
        "run = Popularity(Path(sys.argv[1]), (64, 64))\n"
        "for i in range(150):\n"
        "    run.add(i % 2, [int(sys.argv[2])])\n"
        "    run.save()\n"
    )
    command = [sys.executable, "-c", program, str(folder)]
    with child([*command, "0"]) as one, child([*command, "1"]) as other:
        while one.poll() is None or other.poll() is None:
            if (folder / NAME).exists():
                assert popularity._parse(folder / NAME, (64, 64)) is not None
        assert (one.returncode, other.returncode) == (0, 0)
    assert [path.name for path in folder.iterdir()] == [NAME]
    assert Popularity(folder, (64, 64)).known
