"""A plot of what streaming took for one answer, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edger1.errors import UsageError
from edger1.fetch.place import write_atomically
from edger1.train.plot import Line, lines
from edger1.units import format_bytes


def draw(path: Path, name: str, experts: dict[str, Any] | None) -> None:
    """Write an SVG of each layer's milliseconds a decoded token, waiting and computing.

    `experts` is what `Account.summary` returns. Raises UsageError where the model's experts were not streamed, or the
    file cannot be written.
    """
    if experts is None:
        raise UsageError(f"{name} ran with everything resident, so there is nothing to plot; give less --memory.")
    tokens = max(1, experts["decode"]["tokens"])
    layers = experts["layers"]
    numbers = list(range(len(layers)))
    rate, nbytes = experts["decode"]["hit_rate"], experts["decode"]["bytes_per_token"] or 0
    title = f"{name}: {1.0 if rate is None else rate:.1%} of experts in slots, {format_bytes(int(nbytes))} read a token"
    series = [
        Line("waiting for reads", numbers, [1000 * layer["stall_s"] / tokens for layer in layers]),
        Line("computing", numbers, [1000 * layer["compute_s"] / tokens for layer in layers]),
    ]
    try:
        write_atomically(path, lines(title, "layer with experts", "ms a token", series))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None
