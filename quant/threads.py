"""Threads that may use MLX, kept for the next time instead of ended.

MLX keeps things per thread whose destruction takes the interpreter's lock; a thread that ends while the interpreter
shuts down then aborts the process. So a thread that has done its work waits here for more, and is never ended.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_Work = Callable[[], None]

_lock = threading.Lock()
_parked: list[queue.SimpleQueue[_Work]] = []


def start(work: _Work) -> threading.Event:
    """Run `work`, which must not raise, on a thread; returns what is set when it has returned."""
    with _lock:
        inbox = _parked.pop() if _parked else None
    if inbox is None:
        inbox = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), name="edger1-convert", daemon=True).start()
    ended = threading.Event()

    def run() -> None:
        try:
            work()
        finally:
            with _lock:
                _parked.append(inbox)
            ended.set()

    inbox.put(run)
    return ended


def _serve(inbox: queue.SimpleQueue[_Work]) -> None:
    while True:
        inbox.get()()
