"""Rewards in a process of their own: one that hangs, even in C, is ended when its time is over.

The process is started by spawning, since a fork of one that used MLX hangs, and again after it was ended or died.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from edger1.errors import RewardError, UsageError
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.spec import Spec

OPEN_TIMEOUT_S = 180.0
"""For importing a user's file and the libraries that it needs, which takes long where much else runs."""
_MOST_BYTES = 1 << 20


class CallError(RewardError):
    """What happened to one call, without saying yet which."""


class Worker:
    """Scores completions in a child process."""

    def __init__(self, specs: Sequence[Spec], timeout_s: float, open_timeout_s: float = OPEN_TIMEOUT_S) -> None:
        self._specs = list(specs)
        self._timeout_s = timeout_s
        self._open_timeout_s = open_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process and open every reward in it. Raises UsageError where one cannot be opened."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "edger1.train.rewards.serving"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # A group of its own: Ctrl-C is for the one that waits, and what a function started ends with it.
            start_new_session=True,
        )
        for spec in self._specs:
            try:
                self._ask(("open", spec), self._open_timeout_s)
            except CallError as failure:
                self.close()
                raise UsageError(f'The reward "{spec.name}" cannot be opened: {spec.file or "it"} {failure}.') from None
            except UsageError:
                self.close()
                raise

    def score(self, spec: Spec, completion: Completion) -> float:
        """Return a completion's value. Raises CallError with what happened, UsageError for a row that cannot do."""
        if self._process is None:
            self.start()
        return float(self._ask(("score", spec.text, completion), spec.timeout_s or self._timeout_s))

    def close(self) -> None:
        """End the process and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _ask(self, request: tuple[Any, ...], timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        body = pickle.dumps((*request, timeout_s))
        try:
            self._write(struct.pack("<Q", len(body)) + body, deadline)
            (size,) = struct.unpack("<Q", self._read(8, deadline))
            if size > _MOST_BYTES:
                raise EOFError
            answer = json.loads(self._read(size, deadline))
        except TimeoutError:
            self.close()
            raise CallError(f"took longer than {timeout_s:g} s and was ended") from None
        except (OSError, EOFError):
            raise CallError(self._death()) from None
        except BaseException:
            # Ctrl-C in the middle of an answer: what is left of it must not answer the next question.
            self.close()
            raise
        if "usage" in answer:
            raise UsageError(answer["usage"])
        if "error" in answer:
            raise CallError(answer["error"])
        return answer["value"]

    def _write(self, data: bytes, deadline: float) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        rest = memoryview(data)
        while rest:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([], [descriptor], [], left)[1]:
                raise TimeoutError
            # At most what a pipe takes without blocking once select said that it takes some.
            rest = rest[os.write(descriptor, rest[: select.PIPE_BUF]) :]

    def _read(self, size: int, deadline: float) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        data = b""
        while len(data) < size:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            piece = os.read(descriptor, size - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    def _death(self) -> str:
        """Say how the process ended, and clear it away."""
        process = self._process
        code = None
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(timeout=5)
        self.close()
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                return f"ended its process by {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"
