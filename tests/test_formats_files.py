"""Raw tensors: only what is asked for is read, and a file that changes under the reader is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from model_files import safetensors_bytes, stored
from weight_folders import file_bytes

from edger1.errors import FormatError
from edger1.quant.formats import safetensors
from edger1.quant.formats.files import RawTensor, WeightFiles, check_readable
from edger1.quant.formats.safetensors import Header, parse_header, read_header

MATRIX = np.arange(60, dtype=np.int32).reshape(12, 5)
STACK = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
ARRAYS = {"matrix": ("I32", MATRIX), "stack": ("U8", STACK), "one": ("F32", np.array(1.5, np.float32))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_bytes(ARRAYS))
    return path


@pytest.fixture
def tensors(path: Path) -> Iterator[dict[str, RawTensor]]:
    with WeightFiles([read_header(path)]) as files:
        yield files.tensors()


def announced(path: Path) -> Header:
    """The header of a file as it would be read elsewhere, before the file is here."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return parse_header(path, raw[8 : 8 + length], len(raw))


def test_rows_and_columns_are_those_of_the_array(tensors: dict[str, RawTensor]) -> None:
    for start, stop in [(0, 12), (0, 0), (3, 7), (11, 12)]:
        np.testing.assert_array_equal(tensors["matrix"].rows(start, stop), MATRIX[start:stop])
    for start, stop in [(0, 5), (0, 0), (1, 4), (4, 5)]:
        np.testing.assert_array_equal(tensors["matrix"].columns(start, stop), MATRIX[:, start:stop])
    np.testing.assert_array_equal(tensors["stack"].rows(1, 2), STACK[1:])
    assert tensors["one"].all() == 1.5


def test_only_the_rows_asked_for_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = os.preadv

    def counting(fd: int, buffers: list[memoryview], offset: int) -> int:
        read.append((offset, sum(len(buffer) for buffer in buffers)))
        return real(fd, buffers, offset)

    with WeightFiles([read_header(path)]) as files:
        tensor = files.tensors()["matrix"]
        monkeypatch.setattr(os, "preadv", counting)
        tensor.rows(3, 5)
        assert read == [(tensor.entry.offset + 60, 40)]
        read.clear()
        tensor.columns(2, 4)
        assert read == [(tensor.entry.offset + 20 * row + 8, 8) for row in range(12)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_rows_that_are_not_there_are_a_bug(tensors: dict[str, RawTensor], start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        tensors["matrix"].rows(start, stop)
    with pytest.raises(IndexError):
        tensors["matrix"].columns(start, stop)


def test_many_threads_read_at_once(tensors: dict[str, RawTensor]) -> None:
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda row: tensors["matrix"].rows(row % 12, row % 12 + 1), range(400)))
    for row, part in enumerate(parts):
        np.testing.assert_array_equal(part, MATRIX[row % 12][None])


def test_a_file_that_changes_is_noticed(path: Path, tensors: dict[str, RawTensor]) -> None:
    tensors["matrix"].rows(0, 1)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(FormatError, match=r"model\.safetensors was changed"):
        tensors["matrix"].rows(0, 1)


def test_a_file_that_shrinks_is_noticed(path: Path, tensors: dict[str, RawTensor]) -> None:
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(FormatError, match="became shorter"):
        tensors["one"].all()


def test_a_file_that_is_gone_is_one_sentence(path: Path, tensors: dict[str, RawTensor]) -> None:
    path.unlink()
    with pytest.raises(FormatError, match="no such file"):
        tensors["one"].all()


def test_the_same_name_in_two_files_is_refused(path: Path) -> None:
    other = path.with_name("model-2.safetensors")
    other.write_bytes(file_bytes({"one": ("U8", np.zeros(3, np.uint8))}))
    with WeightFiles([read_header(path), read_header(other)]) as files, pytest.raises(FormatError, match="'one' is in"):
        files.tensors()


def test_the_fingerprint_follows_every_file(path: Path) -> None:
    def fingerprint() -> str:
        with WeightFiles([read_header(path)]) as files:
            return files.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    os.utime(path, ns=(1, 1))
    later = fingerprint()
    assert later != first
    path.write_bytes(file_bytes({**ARRAYS, "one": ("I32", np.array(1, np.int32))}))
    os.utime(path, ns=(1, 1))
    assert fingerprint() not in (first, later)


def test_a_file_may_come_after_its_header(path: Path) -> None:
    header, content = announced(path), path.read_bytes()
    path.unlink()
    with WeightFiles([header]) as files:
        tensor = files.tensors()["matrix"]
        assert not tensor.present
        with pytest.raises(FormatError, match="no such file"):
            tensor.rows(0, 1)
        path.write_bytes(content)
        np.testing.assert_array_equal(tensor.rows(2, 4), MATRIX[2:4])
        # What the converter decided before must hold afterwards.
        assert not tensor.present


def test_another_file_than_the_announced_one_is_refused(path: Path) -> None:
    header = announced(path)
    path.write_bytes(file_bytes({**ARRAYS, "one": ("I32", np.array(1, np.int32))}))
    with WeightFiles([header]) as files, pytest.raises(FormatError, match="not the file that its header announced"):
        files.tensors()["matrix"].rows(0, 1)


def test_a_released_file_is_closed_and_opens_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, closed = [], []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *given, **named: opened.append(real_open(*given, **named)) or opened[-1])
    monkeypatch.setattr(os, "close", lambda fd: closed.append(fd) or real_close(fd))
    header = read_header(path)
    opened.clear()
    closed.clear()
    with WeightFiles([header]) as files:
        tensor = files.tensors()["matrix"]
        tensor.rows(0, 1)
        assert len(opened) == 1
        files.release(path)
        assert closed == opened
        np.testing.assert_array_equal(tensor.rows(0, 1), MATRIX[:1])
        assert len(opened) == 2
    assert len(closed) == 2


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (2,)), ("F6_E2M3", (4,)), ("C64", (1,)), ("F8_E4M3FNUZ", (3,))])
def test_a_dtype_that_cannot_be_read_is_named(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    nbytes = shape[0] * safetensors.DTYPE_BITS[dtype] // 8
    path.write_bytes(safetensors_bytes({"odd": stored(dtype, list(shape), 0, nbytes)}, bytes(nbytes)))
    with WeightFiles([read_header(path)]) as files, pytest.raises(FormatError, match=f"'odd' has the dtype {dtype}"):
        check_readable(files.tensors()["odd"])
