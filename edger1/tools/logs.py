"""What a tool server says beside its answers, kept in a file of limited size."""

from __future__ import annotations

import contextlib
from pathlib import Path

LOG_MAX = 1_000_000
"""Bytes; when a log is full its older half goes."""


class ServerLog:
    """A server's log. A file that cannot be written loses what is said; that stops nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, said: bytes) -> None:
        """Add to the end."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(said[-LOG_MAX:])
                full = file.tell() > LOG_MAX
            if full:
                self.path.write_bytes(self.path.read_bytes()[-LOG_MAX // 2 :])

    def note(self, text: str) -> None:
        """Add a line of our own."""
        self.write(f"[edger1] {text}\n".encode(errors="replace"))

    def tail(self, limit: int = 20_000) -> str:
        """Return the last `limit` bytes as text; empty where there is no log."""
        try:
            return self.path.read_bytes()[-limit:].decode(errors="replace")
        except OSError:
            return ""
