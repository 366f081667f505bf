"""A run's plots, drawn from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edger1.train import plot


def draw(run: Path, entries: list[dict[str, Any]], layers: list[str]) -> None:
    """Write loss.svg and, for a model with experts, experts.svg; `layers` names the routers of the log's `experts`."""
    steps = [e for e in entries if "loss" in e]
    if not steps:
        return
    series = [_line("training", steps, lambda e: e["loss"])]
    if any(e["mtp_loss"] for e in steps):
        series.append(_line("training, MTP", steps, lambda e: e["mtp_loss"]))
    held_out = [e for e in entries if "held_out" in e]
    if held_out:
        series.append(_line("held out", held_out, lambda e: e["held_out"]["loss"]))
        if any(e["held_out"]["mtp_loss"] for e in held_out):
            series.append(_line("held out, MTP", held_out, lambda e: e["held_out"]["mtp_loss"]))
    _write(run / "loss.svg", plot.lines("Loss", "tokens seen", "nats a token", series))
    with_experts = [e for e in steps if "experts" in e]
    if with_experts:
        use = with_experts[-1]["experts"]
        rows = [
            (_short(name), [share * len(shares) for share in shares]) for name, shares in zip(layers, use, strict=True)
        ]
        title = f"Expert use at step {with_experts[-1]['step']}, as multiples of the mean"
        _write(run / "experts.svg", plot.heat_map(title, "expert", rows, 3.0))


def _line(name: str, entries: list[dict[str, Any]], value: Any) -> plot.Line:
    return plot.Line(name, [e["tokens"] for e in entries], [value(e) for e in entries])


def _short(name: str) -> str:
    return "MTP" if name.startswith("mtp.") else f"layer {name.split('.')[2]}"


def _write(path: Path, text: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
