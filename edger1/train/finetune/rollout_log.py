"""Every completion that GRPO sampled, a JSON line each: RUN/rollouts.jsonl.

    {"step", "round", "prompt", "number", "row", "question", "text", "tokens", "finished", "rewards", "reward",
     "advantage", "skipped"}

`step` counts from 1 and is the first optimizer step that learns from it, as in log.jsonl; `round` is above 1 where
DAPO's dynamic sampling went on; `number` is the prompt's among all that were drawn, `row` the completion's in its
group; `question`, the prompt's text, stands with row 0 alone. Lines are only ever added. A run that was resumed from an
earlier step writes those after it again, the same: of lines with the same number and row the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edger1.train.finetune.grpo import Judged

FILE = "rollouts.jsonl"
_TYPES: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "prompt": str,
    "number": int,
    "row": int,
    "text": str,
    "tokens": int,
    "finished": bool,
    "rewards": dict,
    "reward": (int, float),
    "advantage": (int, float),
    "skipped": bool,
}


class RolloutLog:
    """The file, to be added to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int, round: int, judged: Sequence[Judged]) -> None:
        """Add completions that were sampled for optimizer step `step`, counted from 0. Raises SaveError."""
        lines = []
        for each in judged:
            rollout = each.rollout
            entry: dict[str, Any] = {
                "step": step + 1,
                "round": round,
                "prompt": each.prompt.id,
                "number": each.number,
                "row": each.row,
                "text": rollout.text,
                "tokens": len(rollout.ids),
                "finished": rollout.finished,
                "rewards": each.rewards,
                "reward": each.reward,
                "advantage": round_to(each.advantage),
                "skipped": each.skipped,
            }
            if each.row == 0:
                entry["question"] = each.prompt.text
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        try:
            with self.path.open("a+b") as file:
                # A line that was cut off when the process ended must not take the next one with it.
                if file.tell() and not _ends_whole(file):
                    file.write(b"\n")
                file.write("".join(lines).encode("utf-8", "replace"))
        except OSError as error:
            # Here, because it brings MLX along, which the viewer has no use for.
            from edger1.train.folder_writer import SaveError

            raise SaveError(
                f"{self.path} cannot be written: {error.strerror or error}. Make room, then go on with --resume."
            ) from None


def round_to(value: float) -> float:
    """Return a number as it is logged."""
    return round(value, 6)


def _ends_whole(file: Any) -> bool:
    file.seek(-1, 2)
    return bool(file.read(1) == b"\n")


@dataclass
class Group:
    """The completions of one prompt, as logged, by row."""

    prompt: str
    question: str = ""
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Logged:
    """What a log holds: for each step, its groups by number; and how many lines are none."""

    steps: dict[int, dict[int, Group]] = field(default_factory=dict)
    damaged: int = 0


def read(path: Path, step: int | None = None) -> Logged:
    """Read a log, of one step alone where `step` is given, while it may be written to. A missing one is empty."""
    logged = Logged()
    for entry in _entries(path, logged):
        if step is not None and entry["step"] != step:
            continue
        groups = logged.steps.setdefault(entry["step"], {})
        group = groups.setdefault(entry["number"], Group(entry["prompt"]))
        group.rows[entry["row"]] = entry
        if isinstance(entry.get("question"), str):
            group.question = entry["question"]
        if step is None:
            # The table needs no texts, and a long run has many.
            entry["text"] = group.question = ""
    return logged


def _entries(path: Path, logged: Logged) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                # It is being written.
                break
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _TYPES.items()):
                yield entry
            else:
                logged.damaged += 1
