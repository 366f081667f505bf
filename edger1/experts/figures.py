"""What streaming did: for each layer, and added up for a request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


@dataclass
class LayerFigures:
    """Of one layer, since loading. `hits` and `misses` count the distinct experts of each call."""

    calls: int = 0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    """Seconds that the layer stood still because an expert was not there."""
    compute_s: float = 0.0
    """Seconds of everything else since the layer with experts before it."""

    def count(self, experts: int, missing: int, expert_bytes: int) -> None:
        """Note a call that used so many experts."""
        self.calls += 1
        self.hits += experts - missing
        self.misses += missing
        self.bytes_read += missing * expert_bytes

    def copy(self) -> LayerFigures:
        """Return what it is now."""
        return LayerFigures(*(getattr(self, f.name) for f in fields(self)))

    def since(self, before: LayerFigures) -> LayerFigures:
        """Return what was added since `before` was copied."""
        return LayerFigures(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))


def summary(layers: list[LayerFigures], tokens: int) -> dict[str, Any]:
    """Add the figures of layers up, as plain JSON values; `tokens` were fed through them."""
    hits, misses = sum(f.hits for f in layers), sum(f.misses for f in layers)
    stall, compute = sum(f.stall_s for f in layers), sum(f.compute_s for f in layers)
    return {
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "bytes_read": sum(f.bytes_read for f in layers),
        "bytes_per_token": sum(f.bytes_read for f in layers) / tokens if tokens else None,
        "stall_s": stall,
        "compute_s": compute,
        "stall_share": stall / (stall + compute) if stall + compute else None,
        "tokens": tokens,
        "layers": [
            {"hits": f.hits, "misses": f.misses, "bytes_read": f.bytes_read, "stall_s": f.stall_s, "compute_s": f.compute_s}
            for f in layers
        ],
    }
