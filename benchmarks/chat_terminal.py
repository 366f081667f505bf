"""A program on a pseudo-terminal: keys go in, what it writes to the screen comes out, with the time of both."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import common
from benchmarks.worker import SideUnavailableError

ROWS, COLUMNS = 40, 120
QUIT = b"\x11"
"""Ctrl+Q."""


class SilentError(SideUnavailableError):
    """The program ended early or never showed what was waited for."""


class Terminal:
    """A program at the other end of a pseudo-terminal of 120 by 40. `began` is when it was started."""

    def __init__(self, command: Sequence[object], threads: int, **variables: str) -> None:
        self._screen, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        environment = common.child_environment(threads, TERM="xterm-256color", COLORTERM="truecolor", **variables)
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.began = time.perf_counter()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            cwd=common.REPOSITORY,
            start_new_session=True,
        )
        os.close(terminal)

    def read(self, seconds: float) -> bytes | None:
        """Return what was written to the screen within `seconds`: b"" where nothing was, None at the end."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return b""
        try:
            return os.read(self._screen, 1 << 16) or None
        except OSError:
            return None

    def press(self, keys: bytes) -> float:
        """Send keys; returns when that was."""
        now = time.perf_counter()
        os.write(self._screen, keys)
        return now

    def wait(self, *wanted: bytes, seconds: float = 60.0) -> float:
        """Return when the first of `wanted` was written to the screen. Raises SilentError where none was in time."""
        until, tail, longest = time.monotonic() + seconds, b"", max(map(len, wanted))
        while time.monotonic() < until:
            piece = self.read(0.5)
            if piece is None:
                raise SilentError(f"the chat ended with {self._process.wait(10)} before it showed {wanted[0]!r}")
            tail = tail[-longest:] + piece
            if any(each in tail for each in wanted):
                return time.perf_counter()
        raise SilentError(f"the chat did not show {wanted[0]!r} within {seconds:g} s")

    def watch(self, seconds: float, done: Path | None = None) -> None:
        """Read the screen for `seconds`, or until the file `done` is there."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not (done is not None and done.exists()):
            if self.read(min(left, 0.25)) is None:
                raise SilentError("the chat ended by itself")

    def processor_s(self) -> float:
        """Return the processor time of all its threads so far, in seconds."""
        tasks = Path(f"/proc/{self._process.pid}/task")
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9

    def close(self) -> None:
        """Let it quit, end it where it does not, and give the terminal back."""
        if self._process.poll() is None:
            os.write(self._screen, QUIT)
            until = time.monotonic() + 15
            while self._process.poll() is None and time.monotonic() < until:
                if self.read(0.1) is None:
                    time.sleep(0.05)
        self._process.kill()
        self._process.wait()
        os.close(self._screen)


@contextmanager
def terminal(command: Sequence[object], threads: int, **variables: str) -> Iterator[Terminal]:
    """Run a program on a terminal while the context lasts."""
    up = Terminal(command, threads, **variables)
    try:
        yield up
    finally:
        up.close()


def child(*words: object) -> list[object]:
    """Return the command of `benchmarks.chat_child`."""
    return [sys.executable, "-m", "benchmarks.chat_child", *words]
