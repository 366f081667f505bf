"""How each model ran when it was last loaded: which layers on which kernels, and why not on more.

What a model's layers can run as is known only once its weights are in place, so loading writes it down, in kernels.json
in the data folder, and the commands that tell of a model read it there.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.fetch.place import write_atomically


def note(folder: Path, report: dict[str, Any]) -> None:
    """Write down how the model in `folder` runs (plain JSON values); a failure to write is no failure."""
    known = {path: values for path, values in _all().items() if _is_folder(path)}
    known[str(folder)] = {"when": datetime.now(UTC).isoformat(timespec="seconds")} | report
    try:
        write_atomically(_file(), json.dumps(known, indent=2))
    except OSError:
        return


def of(folder: Path) -> dict[str, Any] | None:
    """Return what was noted of the model in `folder`; None if it was never loaded, or the record is damaged.

    Keys: "when" (ISO time), "precision", "active" (whether the kernels were in place), "reason" (why not), "summary"
    (one line) and "layers", a list of {"first", "last", "kind", "runs", "reason"} as `edger1.kernels.blocks` has them;
    "also" has lines about what is not of one layer.
    """
    report = _all().get(str(folder))
    wanted = {
        "when": str,
        "precision": str,
        "active": bool,
        "reason": str,
        "summary": str,
        "layers": list,
        "also": list,
    }
    if not isinstance(report, dict) or not all(isinstance(report.get(key), kind) for key, kind in wanted.items()):
        return None
    return report if all(_is_group(group) for group in report["layers"]) else None


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and {"first", "last", "kind", "runs", "reason"} <= group.keys()


def lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what to show of a report: pairs of what is told of and how it runs."""
    also = [("", line) for line in report["also"]]
    if not report["active"]:
        return [("all layers", f"MLX's own operations: {report['reason']}"), *also]
    ways = {
        "layer": "one operation",
        "attention half": "one operation up to the MLP",
        "attention": "attention as one operation",
        "latent attention": "attention over cached latents as one operation",
        "parts": "kernel by kernel",
    }
    shown = []
    for group in report["layers"]:
        first, last = group["first"], group["last"]
        what = f"layer {first}" if first == last else f"layers {first}-{last}"
        why = f": {group['reason']}" if group["reason"] else ""
        shown.append((what, f"{group['kind']}, {ways.get(group['runs'], group['runs'])}{why}"))
    shown = shown or [("all layers", "kernel by kernel: no decoder layers were found")]
    return shown + also


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:
        # Of another user, or on a disk that has gone.
        return False


def _file() -> Path:
    return paths.data() / "kernels.json"


def _all() -> dict[str, Any]:
    try:
        values: Any = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
