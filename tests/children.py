"""Child processes and threads that no test waits for without an end.

A test that reads from a child waits as long as the child says nothing; a watchdog ends that by killing the child. The
limits are for a machine on which everything stands still now and then, so that reaching one means that it never comes.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_S = 120.0


@contextmanager
def child(command: Sequence[str | Path], limit_s: float = LIMIT_S, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Start a program with the options of subprocess.Popen; it has ended when the block has.

    It is killed after `limit_s`, which closes what the test may be reading from and makes the test fail.
    """
    process = subprocess.Popen(command, **options)
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.kill()

    watchdog = threading.Timer(limit_s, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        assert not late.is_set(), f"{command} had not ended after {limit_s:g} s and was killed"


def until(
    condition: Callable[[], object], what: str, process: subprocess.Popen[Any] | None = None, limit_s: float = 60.0
) -> None:
    """Wait until `condition` holds; `what` says what never came about otherwise. Fails at once if `process` ends."""
    deadline = time.monotonic() + limit_s
    while not condition():
        ended = None if process is None else process.poll()
        # What a process did last may show only after it has ended.
        assert ended is None or condition(), f"{what} never came about: the child ended with {ended}"
        assert time.monotonic() < deadline, f"{what} did not come about within {limit_s:g} s"
        time.sleep(0.01)


def join(*threads: threading.Thread, limit_s: float = 60.0) -> None:
    """Wait until all threads have ended."""
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    still = [thread.name for thread in threads if thread.is_alive()]
    assert not still, f"{still} had not ended after {limit_s:g} s"
