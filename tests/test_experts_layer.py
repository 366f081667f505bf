"""Layers whose experts are read while they compute: reads that fail, and reads that nobody waits for any more."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import streamed_models

from edger1 import kernels
from edger1.errors import StreamError
from edger1.experts import store as store_module
from edger1.experts.store import Read
from edger1.experts.streaming import Streaming

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

TOKENS = [17, 3, 99]


class Disk:
    """Reads of experts, which can be made to hang or to fail."""

    def __init__(self) -> None:
        self._preadv = os.preadv
        self.go = threading.Event()
        self.go.set()
        self.broken = False

    def preadv(self, *given: Any) -> int:
        assert self.go.wait(60)
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._preadv(*given)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(store_module.os, "preadv", made.preadv)
    yield made
    made.go.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return streamed_models.write(tmp_path_factory.mktemp("moe") / "m", "qwen3_moe")


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Any]:
    return streamed_models.resident(folder, prompt=TOKENS[:1], decoded=TOKENS[1:])


@pytest.fixture
def opened(folder: Path) -> Iterator[tuple[Any, Streaming]]:
    """A model whose modules with experts are operations that wait for reads by themselves."""
    model, streaming = streamed_models.open_streamed(folder, streamed_models.half, mode="buffered")
    with streaming.sleeping():
        installed = streamed_models.install(model, "exact")
    streaming.fuse(model, installed)
    assert all(held.operation is not None and held.operation.has_router for held in streaming.layers)
    yield model, streaming
    installed.uninstall()
    streaming.close()


def answers(model: Any) -> list[Any]:
    return streamed_models.outputs(model, prompt=TOKENS[:1], decoded=TOKENS[1:])


class NotWantedError(Exception):
    pass


def test_what_is_being_read_for_a_call_that_was_given_up_is_waited_for_by_the_next(
    opened: tuple[Any, Streaming], expected: list[Any], disk: Disk
) -> None:
    model, streaming = opened

    def give_up() -> None:
        if streaming.banks[0].loading:
            raise NotWantedError

    disk.go.clear()
    streaming.patience_s = 0.01
    streaming.interrupted = give_up
    with pytest.raises(NotWantedError):
        answers(model)
    streaming.interrupted = None
    opening = threading.Timer(0.3, disk.go.set)
    opening.start()
    got = answers(model)
    opening.join(60)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_reads_that_fail_at_once_are_said_as_such(
    opened: tuple[Any, Streaming], expected: list[Any], disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the layer has asked for all it misses, and the next request finds everything in order."""
    model, streaming = opened
    read = streaming.store.read

    def ended(*given: Any, **how: Any) -> Read:
        begun = read(*given, **how)
        assert begun.wait(10)
        return begun

    monkeypatch.setattr(streaming.store, "read", ended)
    disk.broken = True
    with pytest.raises(StreamError, match="input/output error"):
        answers(model)
    disk.broken = False
    for a, b in zip(expected, answers(model), strict=True):
        np.testing.assert_array_equal(a, b)
