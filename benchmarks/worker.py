"""A side of a comparison in a process of its own, which sets up once and then measures when told.

Sides need their own processes because what is compared is process-wide: environment variables, thread pools, patched
modules. The parent keeps both sides alive and asks them in turns; a side that is not asked sleeps.

    python -m benchmarks.worker MODULE:FUNCTION '{"argument": value, ...}'

FUNCTION sets up and returns a callable; each line of JSON on standard input calls it with those arguments, and the
reading it returns goes out as one line of JSON. When the input ends, its `close` is called, where it has one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from benchmarks.common import REPOSITORY

Run = Callable[..., Mapping[str, float]]


class SideUnavailableError(Exception):
    """A side cannot run here, for instance because what it measures is not built; the message says why."""


class Side:
    """A running side: `side.measure(prompt=512)` asks for one reading.

    `info` is what the side tells about itself once it is ready (versions, kernels). Raises SideUnavailableError where
    the setting up failed. `python` is the interpreter it runs with, `within` puts its command into a cgroup.
    """

    def __init__(
        self,
        function: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str],
        *,
        python: str | Path = sys.executable,
        within: Callable[[Sequence[str | Path]], list[str]] = lambda command: [str(word) for word in command],
    ) -> None:
        self._function = function
        self._process = subprocess.Popen(
            within([python, "-m", "benchmarks.worker", function, json.dumps(dict(arguments), default=str)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=REPOSITORY,
            text=True,
        )
        self.info: dict[str, Any] = self._answer()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def measure(self, **request: Any) -> dict[str, float]:
        """Take one reading with these arguments of the side's callable."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise SideUnavailableError(f"{self._function} is gone") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SideUnavailableError(f"{self._function} ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            self.close()
            raise SideUnavailableError(f"{self._function}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def main() -> int:
    """Serve readings until standard input ends."""
    # What libraries print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: Mapping[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    module, _, function = sys.argv[1].partition(":")
    try:
        run: Run = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
        say(getattr(run, "info", {}))
        for line in sys.stdin:
            say(dict(run(**json.loads(line))))
        getattr(run, "close", lambda: None)()
    except Exception as error:
        say({"error": f"{type(error).__name__}: {error}"})
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
