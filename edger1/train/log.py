"""A run's log: JSON lines, one object for each logged step or evaluation.

A step: {"step", "tokens", "loss", "mtp_loss", "balance", "rate", "mtp_weight", "grad_norm", "tokens_per_s", "experts"},
where loss is in nats a token, rate the share of the peak learning rate and experts, for each MoE layer, every expert's
share of the choices since the last entry. An evaluation: {"step", "tokens", "held_out": {"loss", "mtp_loss"}}.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Log:
    """The log file of a run, from which entries after a step are dropped when a run goes on from there."""

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.entries = [entry for entry in read(path) if entry["step"] <= step] if step else []
        text = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        aside = path.with_name(path.name + ".part")
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)

    def write(self, entry: dict[str, Any]) -> None:
        """Add an entry."""
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return a log's entries; a line that is none, as one that was cut off, ends them."""
    entries = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                break
            entries.append(entry)
    return entries
