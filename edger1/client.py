"""Talking to an engine: in this process on a thread of its own, or in a child process.

Both carry the same messages. `submit` sends a request and calls back with its events, from a thread of the client; the
last of them is terminal. If the engine dies, every open request gets a Failed, and nothing waits for ever.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Protocol

from edger1 import errors, worker
from edger1.messages import (
    AdapterUsed,
    CacheRestored,
    CacheSaved,
    Cancel,
    Counted,
    Done,
    Event,
    Failed,
    Loaded,
    Request,
    Scores,
    Unloaded,
    decode,
    encode,
)

TERMINAL = (Done, Failed, Loaded, AdapterUsed, Unloaded, Scores, Counted, CacheSaved, CacheRestored)
OnEvent = Callable[[Event], None]
_SHUTDOWN_S = 10.0

_ids = itertools.count(1)


def next_id() -> str:
    """Return an id for a request, unique in this process."""
    return f"r{next(_ids)}"


def error_of(failed: Failed) -> errors.EdgeR1Error:
    """Turn a Failed back into the exception that it names."""
    kind = getattr(errors, failed.error, errors.EngineError)
    return kind(failed.message) if issubclass(kind, errors.EdgeR1Error) else errors.EngineError(failed.message)


class Connection(Protocol):
    """A way to an engine."""

    def submit(self, request: Request, on_event: OnEvent) -> None:
        """Send a request; `on_event` is called with each of its events, from another thread."""

    def send(self, request: Cancel) -> None:
        """Send a message that has no answer of its own."""

    def close(self) -> None:
        """End the engine; open requests get Failed."""


class _Router:
    """Hands each event to the request it belongs to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, OnEvent] = {}
        self._gone: str | None = None

    def add(self, request: Request, on_event: OnEvent) -> bool:
        """Expect events for `request`; answers Failed at once and returns False where the engine is gone."""
        with self._lock:
            if self._gone is None:
                self._open[request.id] = on_event
                return True
        on_event(Failed(request.id, "EngineError", self._gone))
        return False

    def deliver(self, event: Event) -> None:
        """Hand an event on."""
        with self._lock:
            on_event = self._open.pop(event.id, None) if isinstance(event, TERMINAL) else self._open.get(event.id)
        if on_event is not None:
            _tell(on_event, event)

    def end(self, reason: str) -> None:
        """Fail everything that is open, and whatever comes later."""
        with self._lock:
            if self._gone is None:
                self._gone = reason
            waiting, self._open = self._open, {}
        for id_, on_event in waiting.items():
            _tell(on_event, Failed(id_, "EngineError", reason))


def _tell(on_event: OnEvent, event: Event) -> None:
    try:
        on_event(event)
    except Exception:
        # A fault of whoever listens; the thread that tells serves others too.
        traceback.print_exc(file=sys.stderr)


class ThreadConnection(worker.Closable):
    """An engine on a thread of this process: what the library uses."""

    def __init__(self, ceiling_bytes: int | None = None) -> None:
        self._router = _Router()
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        worker.start(self, partial(_serve, self._router, self._inbox, self._ended, ceiling_bytes))

    def submit(self, request: Request, on_event: OnEvent) -> None:
        """Send a request; `on_event` is called from the engine's thread and must not block."""
        if self._router.add(request, on_event):
            self._inbox.put(request)

    def send(self, request: Cancel) -> None:
        """Send a message that has no answer of its own."""
        self._inbox.put(request)

    def close(self) -> None:
        """End the engine and wait until its thread is free; the step that is running is finished first."""
        self._inbox.put(None)
        self._ended.wait()


def _serve(
    router: _Router,
    inbox: queue.SimpleQueue[Request | None],
    ended: threading.Event,
    ceiling_bytes: int | None,
) -> None:
    from edger1.engine import Scheduler

    try:
        Scheduler(router.deliver, ceiling_bytes).run(inbox)
    finally:
        router.end("The engine is closed.")
        ended.set()


class ChildConnection:
    """An engine in a child process: what the chat and the server use.

    A crash or an out-of-memory kill ends the child alone. The child ends by itself when this process does, since its
    standard input then closes. It is started anew and not forked: a child forked after MLX was used hangs.
    """

    def __init__(self, ceiling_bytes: int | None = None, log: int | None = None) -> None:
        self._router = _Router()
        # -P: no module is taken from the folder that the program happens to be started in.
        command = [sys.executable, "-P", "-m", "edger1.child"]
        if ceiling_bytes is not None:
            command.append(str(ceiling_bytes))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if log is None else log,
            # Ctrl-C in the terminal is for the program in front, which cancels the answer and keeps the engine.
            start_new_session=True,
            encoding="utf-8",
            bufsize=1,
        )
        self._writing = threading.Lock()
        self._unsent: collections.deque[str] = collections.deque()
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="edger1-events", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._router.deliver(decode(line))  # type: ignore[arg-type]
        except ValueError:
            # A child that died in the middle of a line leaves a part of one; one that lives is not the engine.
            self._process.kill()
        finally:
            self._router.end(self._obituary(self._process.wait()))

    def _obituary(self, status: int) -> str:
        if self._closing:
            return "The engine is closed."
        if status == -signal.SIGKILL:
            return (
                "The engine's process was killed, most likely because memory ran out. Try a smaller --context or a "
                "smaller model."
            )
        known = {each.value for each in signal.Signals}
        how = f"exit code {status}" if status >= 0 else f"signal {-status}"
        if -status in known:
            how = signal.Signals(-status).name
        return f"The engine's process ended unexpectedly ({how}). Ask again to start a new one."

    def submit(self, request: Request, on_event: OnEvent) -> None:
        """Send a request; `on_event` is called from the reading thread and must not block."""
        if self._router.add(request, on_event):
            self._write(request)

    def send(self, request: Cancel) -> None:
        """Send a message that has no answer of its own."""
        self._write(request)

    def _write(self, request: Request) -> None:
        self._unsent.append(encode(request) + "\n")
        # Whoever is writing writes this too, be it this very thread: when garbage is collected in the middle of that,
        # a reader of events may go, and cancel its request.
        while self._unsent and self._writing.acquire(blocking=False):
            try:
                self._send_all()
            finally:
                self._writing.release()

    def _send_all(self) -> None:
        assert self._process.stdin is not None
        try:
            while self._unsent:
                self._process.stdin.write(self._unsent.popleft())
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            # The child is gone; the reading thread notices too and fails what is open.
            self._unsent.clear()

    def close(self) -> None:
        """End the child, kindly first."""
        self._closing = True
        assert self._process.stdin is not None
        # A child that does not read lets whoever writes wait.
        kindly = self._writing.acquire(timeout=_SHUTDOWN_S)
        if kindly:
            try:
                with contextlib.suppress(BrokenPipeError):
                    self._process.stdin.close()
            finally:
                self._writing.release()
        try:
            self._process.wait(_SHUTDOWN_S if kindly else 0)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join(_SHUTDOWN_S)


def events(connection: Connection, request: Request) -> Iterator[Event]:
    """Send a request and yield its events up to the terminal one. Leaving early cancels it."""
    arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()
    connection.submit(request, arrived.put)
    ended = False
    try:
        while not ended:
            event = arrived.get()
            ended = isinstance(event, TERMINAL)
            yield event
    finally:
        if not ended:
            connection.send(Cancel(next_id(), request.id))


class _Mailbox:
    """Events for the requests of one event loop, which is woken once for all that arrive before it comes round.

    Requests that are decoded together have their events all at once; waking the loop for each would take the engine's
    thread the interpreter's lock as many times.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrived: list[tuple[asyncio.Queue[Event], Event]] = []

    def put(self, loop: asyncio.AbstractEventLoop, to: asyncio.Queue[Event], event: Event) -> None:
        """Hand over an event, from any thread."""
        with self._lock:
            self._arrived.append((to, event))
            if len(self._arrived) > 1:
                return
        # A loop that has closed has nobody waiting any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
        for to, event in arrived:
            to.put_nowait(event)


_mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()


async def aevents(connection: Connection, request: Request) -> AsyncIterator[Event]:
    """Send a request and yield its events, without blocking the event loop. Leaving early cancels it."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[Event] = asyncio.Queue()
    mailbox = _mailboxes.setdefault(loop, _Mailbox())
    connection.submit(request, partial(mailbox.put, loop, arrived))
    ended = False
    try:
        while not ended:
            event = await arrived.get()
            ended = isinstance(event, TERMINAL)
            yield event
    finally:
        if not ended:
            connection.send(Cancel(next_id(), request.id))
