"""The viewer of a GRPO run, also while it goes on: `edger1 finetune --show RUN`, and with `--step N` its completions.

A terminal gets tables and colours, everything else plain text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from edger1.errors import UsageError
from edger1.train.finetune import rollout_log
from edger1.train.finetune.rollout_log import Group

if TYPE_CHECKING:
    from rich.console import Console

LOG = "log.jsonl"
_TRAINING = ("clipped_low", "clipped_high", "kl", "mismatch")
_HEADINGS = ("step", "reward", "±", "length", "finished", "clipped", "KL", "skipped", "entropy")


@dataclass
class StepRow:
    """A sampling and the updates that followed it; None where nothing is known."""

    step: int
    reward: float
    spread: float
    """Standard deviation of the rewards within a group, averaged over groups."""
    rewards: dict[str, float]
    length: float
    finished: float
    groups: int
    skipped: int
    clipped: float | None = None
    kl: float | None = None
    mismatch: float | None = None
    entropy: float | None = None


@dataclass
class Table:
    """A run's steps, and how many lines of its logs could not be read."""

    rows: list[StepRow] = field(default_factory=list)
    damaged: int = 0


def read(run: Path) -> Table:
    """Read a run's logs. Raises UsageError where the folder has no completions."""
    logged = rollout_log.read(run / rollout_log.FILE)
    if not logged.steps:
        raise UsageError(
            f"{run} has no completions in {rollout_log.FILE}; expected the folder of a GRPO run that has sampled once."
        )
    training, damaged = _training_log(run / LOG)
    steps = sorted(logged.steps)
    table = Table(damaged=logged.damaged + damaged)
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        row = _sampling(step, list(logged.steps[step].values()))
        updates = [entry for at, entry in training if at >= step and (following is None or at < following)]
        row.entropy = _mean(updates, "entropy")
        row.kl, row.mismatch = _mean(updates, "kl"), _mean(updates, "mismatch")
        low, high = _mean(updates, "clipped_low"), _mean(updates, "clipped_high")
        row.clipped = None if low is None and high is None else (low or 0.0) + (high or 0.0)
        table.rows.append(row)
    return table


def show(run: Path, step: int | None = None, console: Console | None = None) -> None:
    """Print a run's table, or the groups of one step. Raises UsageError where there is nothing of it."""
    from rich.console import Console

    console = console or Console()
    if step is None:
        table = read(run)
        _print_table(table, console)
        damaged = table.damaged
    else:
        logged = rollout_log.read(run / rollout_log.FILE, step)
        if not logged.steps:
            raise UsageError(f"{run} has no completions of step {step}; {_known(run)}")
        _print_groups(logged.steps[step], console)
        damaged = logged.damaged
    if damaged:
        _say(console, f"{damaged} damaged {'line' if damaged == 1 else 'lines'} left out")


def _known(run: Path) -> str:
    steps = sorted(rollout_log.read(run / rollout_log.FILE).steps)
    if not steps:
        return "expected the folder of a GRPO run that has sampled once."
    return f"completions were sampled at steps {', '.join(map(str, steps[-8:]))}."


def _sampling(step: int, groups: Sequence[Group]) -> StepRow:
    rows = [entry for group in groups for entry in group.rows.values()]
    names = [name for name, value in rows[0]["rewards"].items() if isinstance(value, int | float)]
    return StepRow(
        step,
        fmean(entry["reward"] for entry in rows),
        fmean(pstdev([entry["reward"] for entry in group.rows.values()]) for group in groups),
        {name: fmean(float(entry["rewards"].get(name, 0.0)) for entry in rows) for name in names},
        fmean(entry["tokens"] for entry in rows),
        fmean(entry["finished"] for entry in rows),
        len(groups),
        sum(any(entry["skipped"] for entry in group.rows.values()) for group in groups),
    )


def _training_log(path: Path) -> tuple[list[tuple[int, dict[str, float]]], int]:
    """Return steps with their figures, those of a table within an entry among them, and how many lines are none."""
    entries: list[tuple[int, dict[str, float]]] = []
    damaged = 0
    if not path.is_file():
        return entries, damaged
    for line in path.read_bytes().splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            damaged += 1
            continue
        inner = entry.get("figures")
        figures = {**entry, **inner} if isinstance(inner, dict) else entry
        entries.append((entry["step"], {n: v for n, v in figures.items() if isinstance(v, int | float)}))
    return entries, damaged


def _mean(entries: Sequence[dict[str, float]], name: str) -> float | None:
    found = [entry[name] for entry in entries if name in entry]
    return fmean(found) if found else None


def _cells(row: StepRow) -> list[str]:
    return [
        str(row.step),
        f"{row.reward:.3f}",
        f"{row.spread:.3f}",
        f"{row.length:.0f}",
        f"{100 * row.finished:.0f}%",
        _percent(row.clipped),
        _number(row.kl),
        f"{row.skipped}/{row.groups}",
        _number(row.entropy),
        *[f"{value:.3f}" for value in row.rewards.values()],
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _print_table(table: Table, console: Console) -> None:
    headings = [*_HEADINGS, *table.rows[0].rewards]
    lines = [_cells(row) for row in table.rows]
    if console.is_terminal:
        from rich import box
        from rich.table import Table as Shown

        shown = Shown(box=box.SIMPLE_HEAD)
        for heading in headings:
            shown.add_column(heading, justify="right", no_wrap=True)
        for line in lines:
            shown.add_row(*line)
        console.print(shown)
        return
    widths = [max(len(heading), *(len(line[i]) for line in lines)) for i, heading in enumerate(headings)]
    for line in [headings, *lines]:
        _say(console, "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _print_groups(groups: dict[int, Group], console: Console) -> None:
    for number in sorted(groups):
        group = groups[number]
        rows = [group.rows[row] for row in sorted(group.rows)]
        skipped = " · no variance, skipped" if rows[0]["skipped"] else ""
        _say(console, f"━━ {group.prompt} · {len(rows)} completions{skipped}", "bold")
        if group.question:
            _say(console, group.question.rstrip(), "dim")
        for entry in rows:
            _say(console, f"── {_verdict(entry)}", "green" if entry["advantage"] > 0 else "red")
            _say(console, entry["text"].rstrip())
        _say(console, "")


def _verdict(entry: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {value:g}" for name, value in entry["rewards"].items() if isinstance(value, int | float))
    end = "" if entry["finished"] else ", cut off"
    return f"reward {entry['reward']:g} ({parts}) · advantage {entry['advantage']:+.3f} · {entry['tokens']} tokens{end}"


def _say(console: Console, text: str, style: str | None = None) -> None:
    """Print text as it is; what a model wrote may hold a terminal's control sequences."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
    console.print(shown, style=style, markup=False, highlight=False, soft_wrap=True)
