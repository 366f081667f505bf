"""What a miss cost in each layer when a model was last used: how long decoding stood still for experts not there.

Slots are divided by it (`budget`). A miss costs what its read takes beyond what the layer computes meanwhile, which
depends on the machine as much as on the model: so the file, miss-costs.json, lies in the data folder, one entry a model
folder. It is a hint: what is damaged or of another model is ignored and written anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.experts.anatomy import LayerExperts
from edger1.fetch.place import write_atomically

VERSION = 1
MOST = 5000.0
"""Misses a layer from which older ones count less, so that a new disk is learnt."""
TRUSTED = 100.0
"""Misses from which a layer's own mean counts more than what its experts' size makes likely."""


class MissCosts:
    """Misses of a model's layers and the seconds that they took, of earlier runs and of this one."""

    def __init__(self, folder: Path, layers: Sequence[LayerExperts]) -> None:
        self._key = str(folder)
        self._sizes = [layer.expert_bytes for layer in layers]
        found = _all().get(self._key)
        sound = found is not None and len(found["misses"]) == len(found["stall_s"]) == len(layers)
        self._misses: list[float] = found["misses"] if found is not None and sound else [0.0] * len(layers)
        self._stalls: list[float] = found["stall_s"] if found is not None and sound else [0.0] * len(layers)
        self._changed = False

    def add(self, misses: Sequence[float], stall_s: Sequence[float]) -> None:
        """Count misses of each layer, and the seconds that each stood still for them."""
        for i, (count, seconds) in enumerate(zip(misses, stall_s, strict=True)):
            if count > 0 and seconds >= 0:
                self._misses[i] += count
                self._stalls[i] += seconds
                self._changed = True
            if self._misses[i] > MOST:
                self._stalls[i] *= MOST / self._misses[i]
                self._misses[i] = MOST

    def seconds(self) -> list[float] | None:
        """Return what one miss costs in each layer; None while nothing is known.

        A layer with few misses is taken to cost what its experts' size makes likely from all layers together.
        """
        missed = sum(count * size for count, size in zip(self._misses, self._sizes, strict=True))
        if sum(self._misses) < TRUSTED or sum(self._stalls) <= 0:
            return None
        a_byte = sum(self._stalls) / missed
        return [
            (stall + TRUSTED * size * a_byte) / (count + TRUSTED)
            for count, stall, size in zip(self._misses, self._stalls, self._sizes, strict=True)
        ]

    def save(self) -> None:
        """Write what is known, if there is anything new; a failure to write is no failure."""
        if not self._changed:
            return
        entry = {
            "misses": [round(count, 1) for count in self._misses],
            "stall_s": [round(stall, 6) for stall in self._stalls],
        }
        models = {key: value for key, value in _all().items() if Path(key).is_dir()} | {self._key: entry}
        with suppress(OSError):
            write_atomically(_file(), json.dumps({"version": VERSION, "models": models}) + "\n")
            self._changed = False


def _file() -> Path:
    return paths.data() / "miss-costs.json"


def _all() -> dict[str, Any]:
    """Return the entries of the file that are sound."""
    try:
        content: Any = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    models = content.get("models") if isinstance(content, dict) and content.get("version") == VERSION else None
    return {key: entry for key, entry in models.items() if _is_sound(entry)} if isinstance(models, dict) else {}


def _is_sound(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    lists = [entry.get("misses"), entry.get("stall_s")]
    return all(isinstance(values, list) and all(map(_is_amount, values)) for values in lists)


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e12 and math.isfinite(value)
