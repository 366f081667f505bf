"""A run's plots, drawn from its log, and its folders."""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

from edger1.train import plot
from edger1.train.folder_writer import write_folder


def draw(run: Path, entries: list[dict[str, Any]]) -> None:
    """Write loss.png and, where the log has rewards, reward.png; SVG where matplotlib is not installed."""
    steps = [e for e in entries if "loss" in e]
    measured = [e for e in entries if "evaluation" in e]
    _plot(run / "loss", "Loss", "nats a token", _series(steps, measured, "loss"))
    _plot(run / "reward", "Reward", "reward", _series(steps, measured, "reward"))


def _series(steps: list[dict[str, Any]], measured: list[dict[str, Any]], name: str) -> list[plot.Line]:
    trained = [(e["step"], e[name]) for e in steps if name in e]
    held_out = [(e["step"], e["evaluation"][name]) for e in measured if name in e["evaluation"]]
    return [
        plot.Line(label, [x for x, _ in points], [y for _, y in points])
        for label, points in (("training", trained), ("held out", held_out))
        if points
    ]


def _plot(path: Path, title: str, y_label: str, series: list[plot.Line]) -> None:
    if not series:
        return
    try:
        # Without pyplot, which would look for a display.
        from matplotlib.figure import Figure
    except ImportError:
        _replace(path.with_suffix(".svg"), plot.lines(title, "step", y_label, series).encode())
        return
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for line in series:
        axes.plot(line.x, line.y, label=line.name, marker="." if len(line.x) < 30 else None, linewidth=1.2)
    axes.set(title=title, xlabel="step", ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    image = BytesIO()
    figure.savefig(image, format="png", dpi=120)
    _replace(path.with_suffix(".png"), image.getvalue())


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(content)
    aside.replace(path)


def copy_folder(source: Path, destination: Path) -> None:
    """Put a copy of a folder of files in another's place, whole or not at all. Raises SaveError."""

    def fill(aside: Path) -> None:
        for path in source.iterdir():
            shutil.copyfile(path, aside / path.name)

    write_folder(destination, fill)
