"""Programs that a model wrote, run in a subprocess with limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 16 * 2**20
    processes: int = 16
    output_bytes: int = 65536


@dataclass(frozen=True)
class SandboxResult:
    """What a program did."""

    passed: int
    total: int
    ended: str
    """"exit", "timeout", "signal" or "refused"."""
    output: str
    """Standard output and error of the first test that failed, up to the limit."""

    @property
    def share(self) -> float:
        """The share of tests that passed."""
        return self.passed / self.total if self.total else 0.0


def run(code: str, tests: Any, limits: Limits = Limits()) -> SandboxResult:  # noqa: B008
    """Run `code` against `tests`.

    `tests`: Python text with assertions, a list of them, or a list of {"input": ..., "output": ...} for programs that
    read standard input and write standard output.
    """
    raise NotImplementedError
