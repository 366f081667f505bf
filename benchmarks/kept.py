"""The kept results: one JSON file a benchmark, one entry a part, each with its own date, machine and commit.

A part that is measured again replaces its own entry and leaves the others, so that a disturbed one costs its own time
only.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY, RESULTS, Comparison, Side, machine


def save(
    benchmark: str,
    part: str,
    comparisons: list[Comparison],
    *,
    notes: list[str],
    conditions: Mapping[str, Any],
    folder: Path = RESULTS,
) -> Path:
    """Put one part into `folder`/`benchmark`.json: raw readings, medians, figures, machine, versions, date, commit."""
    path = folder / f"{benchmark}.json"
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {"benchmark": benchmark, "parts": {}}
    if path.exists():
        kept = json.loads(path.read_text())
    kept["parts"][part] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        # The results themselves are rewritten by the run, so they do not count as a change of what was measured.
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "command": command_line(benchmark),
        "machine": machine(),
        "conditions": dict(conditions),
        "comparisons": [_described(comparison) for comparison in comparisons],
        "notes": notes,
    }
    path.write_text(json.dumps(kept, indent=1) + "\n")
    return path


def _described(comparison: Comparison) -> dict[str, Any]:
    def side(it: Side) -> dict[str, Any]:
        return dataclasses.asdict(it) | {"median": it.median, "spread": round(it.spread, 4)}

    return {
        "what": comparison.what,
        "form": comparison.form,
        "figure": round(comparison.figure, 4),
        "bar": comparison.bar,
        "met": comparison.met,
        "less_is_better": comparison.less_is_better,
        "ours": side(comparison.ours),
        "peer": side(comparison.peer),
    }


def comparisons(part: Mapping[str, Any]) -> list[Comparison]:
    """Return the comparisons of one kept part."""

    def side(it: Mapping[str, Any]) -> Side:
        return Side(it["name"], it["settings"], it["unit"], tuple(it["readings"]))

    return [
        Comparison(
            line["what"], side(line["ours"]), side(line["peer"]), line["bar"], line["less_is_better"], line["form"]
        )
        for line in part["comparisons"]
    ]


def names() -> list[str]:
    """Return the benchmarks that have kept results; other programs keep files of other forms in the same folder."""
    return sorted(path.stem for path in RESULTS.glob("*.json") if "parts" in json.loads(path.read_text()))


def parts(benchmark: str) -> dict[str, Any]:
    """Return the kept parts of a benchmark by name. Raises FileNotFoundError where there are none."""
    found: dict[str, Any] = json.loads((RESULTS / f"{benchmark}.json").read_text())["parts"]
    return found


def command_line(benchmark: str) -> str:
    """Return the command to repeat this run with, with paths of this machine reduced to their last part."""
    shown = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", f"benchmarks.{benchmark}", *shown])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
