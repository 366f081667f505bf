"""The ways to an engine when something goes wrong at the listener's, the writer's or the other model's end."""

from __future__ import annotations

import gc
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import write_mixture

import edger1
from edger1 import client, kernels
from edger1.client import ChildConnection, ThreadConnection, next_id
from edger1.messages import CountTokens, Event, Failed, Progress

# One model's experts come from a slow disk, while another one is loaded and closed again and again.
TWO_MODELS = """
import sys, threading, time
from pathlib import Path
import edger1
from edger1.experts.store import Store

Store.holds = lambda self, layer, expert: False
read = Store._read_part

def slowly(self, *given):
    time.sleep(0.003)
    read(self, *given)

Store._read_part = slowly
large = edger1.load(Path(sys.argv[1]), context=1024, expert_slots=8)
over = threading.Event()

def ask():
    while not over.is_set():
        large.generate("abc", raw=True, max_tokens=40, temperature=1.0)

asking = threading.Thread(target=ask)
asking.start()
for _ in range(4):
    time.sleep(0.2)
    with edger1.load(Path(sys.argv[2]), context=256) as small:
        small.generate("Hi", max_tokens=3)
over.set()
asking.join()
large.close()
print("closed")
"""


@pytest.mark.skipif(not kernels.state().available, reason="only their operations wait for threads of Python")
def test_a_model_closes_while_anothers_experts_are_read(tmp_path: Path, tiny_folder: Path) -> None:
    mixture = tmp_path / "mixture"
    mixture.mkdir()
    write_mixture(mixture)
    command = [sys.executable, "-c", TWO_MODELS, str(mixture), str(tiny_folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "closed\n", done.stderr


@pytest.fixture(params=[ChildConnection, ThreadConnection])
def connection(request: pytest.FixtureRequest) -> Any:
    made = request.param()
    yield made
    made.close()


def count(connection: Any, on_event: Any, text: str = "x") -> None:
    connection.submit(CountTokens(next_id(), "no model", text), on_event)


def test_a_listener_that_fails_harms_no_other(connection: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(event: Event) -> None:
        raise RuntimeError("the listener is broken")

    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    count(connection, fails)
    count(connection, heard.put)
    assert isinstance(heard.get(timeout=60), Failed)
    count(connection, fails)
    connection.close()
    count(connection, heard.put)
    assert isinstance(heard.get(timeout=60), Failed)
    assert capsys.readouterr().err.count("RuntimeError: the listener is broken") == 2


def test_an_answer_that_cannot_be_put_together_is_an_error(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.response import Collector

    with edger1.load(tiny_folder, context=256) as model:
        monkeypatch.setattr(Collector, "add", lambda self, event: 1 / 0)
        handle = model.submit("Hi", max_tokens=3)
        with pytest.raises(edger1.EngineError, match="put together"):
            handle.result(timeout_s=60)


def test_a_reader_that_is_collected_while_a_request_is_written_cancels_its_own() -> None:
    connection = ChildConnection()
    # It answers later.
    os.kill(connection.pid, signal.SIGSTOP)
    try:
        request = CountTokens(next_id(), "no model", "x")
        reader = client.events(connection, request)
        threading.Timer(0.2, connection._router.deliver, [Progress(request.id, "prefill", 1, 2)]).start()
        assert next(reader) == Progress(request.id, "prefill", 1, 2)
        encode, sent = client.encode, []

        def collects(request: Any) -> str:
            nonlocal reader
            sent.append(type(request).__name__)
            reader = None  # type: ignore[assignment]
            gc.collect()
            return encode(request)

        heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(client, "encode", collects)
            writing = threading.Thread(target=count, args=(connection, heard.put))
            writing.start()
            writing.join(30)
        assert sent == ["CountTokens", "Cancel"]
        os.kill(connection.pid, signal.SIGCONT)
        assert isinstance(heard.get(timeout=60), Failed)
    finally:
        os.kill(connection.pid, signal.SIGCONT)
        connection.close()


def test_a_child_that_does_not_read_is_closed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SHUTDOWN_S", 0.5)
    connection = ChildConnection()
    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    os.kill(connection.pid, signal.SIGSTOP)
    # More than a pipe holds.
    writing = threading.Thread(target=count, args=(connection, heard.put, "x" * 1_000_000))
    writing.start()
    time.sleep(0.2)
    closing = threading.Thread(target=connection.close)
    closing.start()
    closing.join(60)
    writing.join(60)
    assert not closing.is_alive()
    assert not writing.is_alive()
    assert isinstance(heard.get(timeout=60), Failed)


def test_the_end_of_a_child_by_any_signal_is_told() -> None:
    connection = ChildConnection()
    heard: queue.SimpleQueue[Event] = queue.SimpleQueue()
    os.kill(connection.pid, signal.SIGSTOP)
    count(connection, heard.put)
    # One that Python has no name for.
    os.kill(connection.pid, signal.SIGRTMIN + 3)
    os.kill(connection.pid, signal.SIGCONT)
    failed = heard.get(timeout=60)
    connection.close()
    assert isinstance(failed, Failed)
    assert f"signal {signal.SIGRTMIN + 3}" in failed.message
