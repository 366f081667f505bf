"""The threads that own MLX in this process.

A thread that has used MLX is never ended: its C++ thread-locals take the interpreter's lock when they are destroyed,
and if the interpreter is shutting down by then the whole process aborts. So an engine's thread, when the engine closes,
is parked and serves the next one.
"""

from __future__ import annotations

import atexit
import contextlib
import queue
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Work = Callable[[], None]
_Result = TypeVar("_Result")

_lock = threading.Lock()
_parked: list[queue.SimpleQueue[_Work]] = []
_closers: weakref.WeakSet[Closable] = weakref.WeakSet()


class Closable:
    """Something that runs on a worker thread, and must be closed before the interpreter shuts down."""

    def close(self) -> None:
        """Finish, and return when the worker thread is free again."""
        raise NotImplementedError


def start(owner: Closable, work: _Work) -> None:
    """Run `work` on a worker thread; `owner` is closed at exit if nobody did before."""
    _closers.add(owner)
    _run(work)


def call(work: Callable[[], _Result]) -> _Result:
    """Run `work` on a worker thread and return what it returns, or raise what it raises."""
    future: Future[_Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    _run(run)
    return future.result()


def _run(work: _Work) -> None:
    with _lock:
        inbox = _parked.pop() if _parked else None
    if inbox is None:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="edger1-engine", daemon=True).start()
    inbox.put(work)


def _serve(inbox: queue.SimpleQueue[_Work]) -> None:
    while True:
        try:
            inbox.get()()
        except BaseException:
            # The thread must not end, whatever its work came to.
            traceback.print_exc(file=sys.stderr)
        with _lock:
            _parked.append(inbox)


@atexit.register
def _close_all() -> None:
    for owner in list(_closers):
        # At exit there is nobody left who could act on an error.
        with contextlib.suppress(Exception):
            owner.close()
