"""Reading experts: the right bytes whatever the alignment, and clear errors from files that misbehave."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edger1.errors import StreamError
from edger1.experts import store as store_module
from edger1.experts.anatomy import LayerExperts, Part
from edger1.experts.store import Store

EXPERTS = 5
# The first begins at an odd byte, and is larger than a page or than what is read through huge pages; the last ends with
# the file.
SIZES = {"gate_proj": 70_001, "up_proj": 4096, "down_proj": 12_345}
LARGE = 2_200_001


@pytest.fixture(params=[SIZES["gate_proj"], LARGE], ids=["pages", "huge pages"])
def layer(tmp_path: Path, request: Any) -> LayerExperts:
    """A layer whose parts lie one after the other in a file of random bytes."""
    path = tmp_path / "model.safetensors"
    offset, parts = 177, []
    for projection, nbytes in (SIZES | {"gate_proj": request.param}).items():
        parts.append(Part(projection, "weight", path, offset, nbytes, (nbytes,), "U8"))
        offset += EXPERTS * nbytes
    path.write_bytes(np.random.default_rng(0).bytes(offset))
    return LayerExperts(0, "model.layers.0.mlp.switch_mlp", EXPERTS, 2, tuple(parts))


@pytest.fixture(params=["auto", "direct", "buffered"])
def store(request: Any, layer: LayerExperts) -> Iterator[Store]:
    with_store = Store([layer], mode=request.param)
    yield with_store
    with_store.close()


def room(layer: LayerExperts) -> list[Any]:
    return [np.zeros(part.nbytes, np.uint8) for part in layer.parts]


def expected(layer: LayerExperts, expert: int) -> list[bytes]:
    raw = layer.parts[0].file.read_bytes()
    return [raw[p.offset + expert * p.nbytes :][: p.nbytes] for p in layer.parts]


def drop_from_page_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@pytest.mark.parametrize("cached", [True, False])
def test_every_expert_has_its_bytes(store: Store, layer: LayerExperts, cached: bool) -> None:
    if not cached:
        drop_from_page_cache(layer.parts[0].file)
    rooms = [room(layer) for _ in range(EXPERTS)]
    reads = [store.read(layer, expert, into) for expert, into in enumerate(rooms)]
    for expert, (read, into) in enumerate(zip(reads, rooms, strict=True)):
        assert read.wait(10)
        assert read.error is None
        assert [part.tobytes() for part in into] == expected(layer, expert)
    assert store.counts.nbytes == EXPERTS * layer.expert_bytes


def test_reads_that_come_in_pieces_are_put_together(
    store: Store, layer: LayerExperts, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: list[Any], offset: int) -> int:
        # Whole blocks, as a device gives them.
        return preadv(descriptor, [memoryview(buffers[0])[: max(512, len(buffers[0]) // 3 // 512 * 512)]], offset)

    monkeypatch.setattr(store_module.os, "preadv", short)
    into = room(layer)
    read = store.read(layer, 3, into)
    assert read.wait(10)
    assert read.error is None
    assert [part.tobytes() for part in into] == expected(layer, 3)


def test_a_file_that_has_shrunk_is_named(store: Store, layer: LayerExperts) -> None:
    path = layer.parts[0].file
    os.truncate(path, path.stat().st_size - 1)
    read = store.read(layer, 0, room(layer))
    assert read.wait(10)
    with pytest.raises(StreamError, match=r"model.safetensors now has .* bytes while .*Load the model again"):
        raise read.error or AssertionError


def test_a_file_that_was_written_to_is_named(store: Store, layer: LayerExperts) -> None:
    path = layer.parts[0].file
    about = path.stat()
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"other weights")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns + 1_000_000))
    read = store.read(layer, 0, room(layer))
    assert read.wait(10)
    assert "changed while the model was in use" in str(read.error)


def test_a_file_that_was_replaced_goes_on_as_it_was(store: Store, layer: LayerExperts) -> None:
    path = layer.parts[0].file
    wanted = expected(layer, 2)
    other = path.with_suffix(".new")
    other.write_bytes(b"x")
    other.replace(path)
    into = room(layer)
    read = store.read(layer, 2, into)
    assert read.wait(10)
    assert read.error is None
    assert [part.tobytes() for part in into] == wanted


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looking at open files needs /proc")
def test_a_file_that_cannot_be_opened_leaves_no_other_open(layer: LayerExperts) -> None:
    def is_open() -> bool:
        return any(each.resolve() == layer.parts[0].file.resolve() for each in Path("/proc/self/fd").iterdir())

    for number in range(8):
        missing = layer.parts[0].file.with_name(f"missing-{number}")
        gone = replace(layer, parts=(*layer.parts, replace(layer.parts[0], file=missing)))
        with pytest.raises(StreamError, match=f"missing-{number} cannot be read"):
            Store([gone])
        assert not is_open()


def test_an_io_error_says_where(store: Store, layer: LayerExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store_module.os, "preadv", fail)
    read = store.read(layer, 1, room(layer))
    assert read.wait(10)
    assert isinstance(read.error, StreamError)
    assert "Reading expert 1 of" in str(read.error)
    assert "input/output error" in str(read.error)
    monkeypatch.undo()
    again = store.read(layer, 1, room(layer))
    assert again.wait(10)
    assert again.error is None


def test_what_is_wanted_goes_before_guesses(layer: LayerExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store([layer], mode="buffered", threads=1)
    preadv, go, order = os.preadv, threading.Event(), []

    def held(descriptor: int, buffers: list[Any], offset: int) -> int:
        go.wait(10)
        order.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(store_module.os, "preadv", held)
    reads = [store.read(layer, 0, room(layer))]
    reads += [store.read(layer, expert, room(layer), guessed=True) for expert in (1, 2, 3)]
    reads.append(store.read(layer, 4, room(layer)))
    store.hurry(reads[3])
    reads[1].cancel()
    go.set()
    for read in reads:
        assert read.wait(10)
    first = layer.parts[0]
    firsts = [(offset - first.offset) // first.nbytes for offset in order if offset < layer.parts[1].offset]
    assert firsts == [0, 4, 3, 2]
    assert reads[1].error is not None
    store.close()


@pytest.mark.parametrize("mode", ["auto", "direct"])
def test_without_memory_for_direct_reads_they_are_buffered(
    layer: LayerExperts, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(store_module, "_staging", refuse)
    drop_from_page_cache(layer.parts[0].file)
    store, into = Store([layer], mode=mode), room(layer)
    try:
        read = store.read(layer, 3, into)
        assert read.wait(10)
        assert read.error is None
        assert [each.tobytes() for each in into] == expected(layer, 3)
    finally:
        store.close()


def test_files_that_nobody_can_guard_are_not_computed_on(layer: LayerExperts) -> None:
    def too_many(_: Any) -> None:
        raise RuntimeError("512 maps are guarded already")

    store = Store([layer])
    try:
        assert store.maps(layer, SimpleNamespace(MapGuard=too_many)) is None
        found = store.maps(layer, SimpleNamespace(MapGuard=lambda mapped: mapped))
        if found is not None:
            read = [bytes(found[part.projection, part.name][2]) for part in layer.parts]
            assert read == expected(layer, 2)
    finally:
        store.close()


def test_closing_does_not_wait_for_a_disk_that_hangs(layer: LayerExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store([layer], mode="buffered", threads=1)
    preadv, go = os.preadv, threading.Event()

    def hang(*given: Any) -> int:
        go.wait(30)
        return preadv(*given)

    monkeypatch.setattr(store_module.os, "preadv", hang)
    store.read(layer, 0, room(layer))
    waiting = store.read(layer, 1, room(layer))
    store.close()
    assert waiting.wait(1)
    assert waiting.error is not None
    with pytest.raises(StreamError, match="closed"):
        store.read(layer, 2, room(layer))
    go.set()
