"""Line plots and heat maps as SVG, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 36, 48
_COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")


@dataclass(frozen=True)
class Line:
    """A named series of points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def lines(title: str, x_label: str, y_label: str, series: Sequence[Line]) -> str:
    """Return an SVG of lines over common axes; points that are not finite are left out."""
    points = {
        line.name: [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for line in series
    }
    everything = [p for line in points.values() for p in line] or [(0.0, 0.0), (1.0, 1.0)]
    x_ticks = _ticks(min(x for x, _ in everything), max(x for x, _ in everything))
    y_ticks = _ticks(min(y for _, y in everything), max(y for _, y in everything))
    x_low, x_high = x_ticks[0], x_ticks[-1]
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM),
        )

    parts = []
    for x in x_ticks:
        px, _ = at(x, y_low)
        parts.append(f'<line x1="{px:.1f}" y1="{_TOP}" x2="{px:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#d0d7de"/>')
        parts.append(_text(px, _HEIGHT - _BOTTOM + 16, _number(x), "middle"))
    for y in y_ticks:
        _, py = at(x_low, y)
        parts.append(f'<line x1="{_LEFT}" y1="{py:.1f}" x2="{_WIDTH - _RIGHT}" y2="{py:.1f}" stroke="#d0d7de"/>')
        parts.append(_text(_LEFT - 6, py + 4, _number(y), "end"))
    for i, (name, line) in enumerate(points.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts.append(f'<rect x="{_WIDTH - 190}" y="{_TOP + 8 + 18 * i}" width="12" height="3" fill="{colour}"/>')
        parts.append(_text(_WIDTH - 172, _TOP + 14 + 18 * i, name, "start"))
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label, "middle"))
    parts.append(_text(_LEFT, _TOP - 8, y_label, "start"))
    return _document(title, _HEIGHT, parts)


def heat_map(title: str, x_label: str, rows: Sequence[tuple[str, Sequence[float]]], top: float) -> str:
    """Return an SVG of one line of cells for each named row, from white at 0 to blue at `top`."""
    cell, columns = 18, max((len(values) for _, values in rows), default=1)
    height = _TOP + cell * len(rows) + _BOTTOM
    width = (_WIDTH - _LEFT - _RIGHT - 60) / columns
    parts = []
    for i, (name, values) in enumerate(rows):
        y = _TOP + cell * i
        parts.append(_text(_LEFT - 6, y + 13, name, "end"))
        for j, value in enumerate(values):
            depth = max(0.0, min(1.0, value / top))
            red, green, blue = (round(255 + (c - 255) * depth) for c in (31, 111, 235))
            place = f'x="{_LEFT + width * j:.1f}" y="{y}" width="{width:.1f}" height="{cell - 1}"'
            parts.append(f'<rect {place} fill="rgb({red},{green},{blue})"><title>{value:.3g}</title></rect>')
        parts.append(_text(_LEFT + width * columns + 6, y + 13, f"max {max(values, default=0):.2f}", "start"))
    parts.append(_text(_LEFT + width * columns / 2, height - 16, x_label, "middle"))
    return _document(title, height, parts)


def _document(title: str, height: float, parts: list[str]) -> str:
    font = 'font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {font}>'
    back = f'<rect width="{_WIDTH}" height="{height}" fill="white"/>'
    name = f'<text x="{_WIDTH / 2}" y="16" text-anchor="middle" font-size="14">{escape(title)}</text>'
    return "\n".join([head, back, name, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers from at or below `low` to at or above `high`, about six."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:.6g}"
