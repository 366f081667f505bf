"""How often each expert was used, kept beside the model so that the next run starts with the right ones in memory.

expert-popularity.json holds, for every MoE layer, one count an expert. Newer use counts more: whenever a run adds its
own, what was there before shrinks by half for every `HALF_LIFE` uses of an expert, on average, that are new.

The file is a hint and treated as one: what is damaged, of another version or of another shape is ignored and written
anew; a model folder that cannot be written to is left alone, and the file goes into the data folder. It is replaced
as a whole, so programs that save at the same time leave the counts of one of them, never a mixture.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from edger1 import paths
from edger1.fetch.place import write_atomically

NAME = "expert-popularity.json"
VERSION = 1
HALF_LIFE = 1000.0
MAX_FILE_BYTES = 64 * 10**6


class Popularity:
    """Use counts of a model's experts: those of earlier runs, and those of this one until `save` joins them."""

    def __init__(self, folder: Path, experts: Sequence[int]) -> None:
        """Read the counts of the model in `folder`, whose MoE layers have so many `experts`, in order."""
        self._folder = folder
        self._experts = tuple(experts)
        self._before = self._read()
        self._fresh = self._nothing()

    def add(self, layer: int, experts: Iterable[int]) -> None:
        """Count one use of each of `experts` by MoE layer number `layer`; one may come several times."""
        fresh = self._fresh[layer]
        for expert in experts:  # lists, because NumPy takes ten times as long for the few of a step
            fresh[expert] += 1

    def counts(self, layer: int) -> np.ndarray:
        """Return a layer's counts, float64 [experts], this run's included; zeros where nothing is known."""
        return _joined(self._before[layer], self._fresh[layer])

    def uses(self) -> list[list[int]]:
        """Return how often each expert of each layer was used since the counts were last saved."""
        return [list(layer) for layer in self._fresh]

    @property
    def known(self) -> bool:
        """Whether anything was ever counted."""
        return any(before.any() or any(fresh) for before, fresh in zip(self._before, self._fresh, strict=True))

    def save(self) -> Path | None:
        """Add this run's counts to what is on disk by now; returns the file, None where none could be written.

        May be called again and again: only what is new is added.
        """
        if not any(map(any, self._fresh)):
            return None
        joined = [_joined(before, fresh) for before, fresh in zip(self._read(), self._fresh, strict=True)]
        content = {"version": VERSION, "counts": [[round(value, 2) for value in layer.tolist()] for layer in joined]}
        saved = self._write(json.dumps(content, separators=(",", ":")) + "\n")
        if saved is not None:
            self._before, self._fresh = joined, self._nothing()
        return saved

    def _nothing(self) -> list[list[int]]:
        return [[0] * count for count in self._experts]

    def _files(self) -> list[Path]:
        """Return where the file may lie, the preferred place first."""
        here = self._folder.resolve()
        known_by = f"{here.name}-{hashlib.sha256(str(here).encode()).hexdigest()[:12]}.json"
        aside = paths.data() / "popularity" / known_by
        # What comes with the program belongs to its installation, also where that happens to be writable.
        return [aside] if here.is_relative_to(paths.assets().resolve()) else [self._folder / NAME, aside]

    def _write(self, text: str) -> Path | None:
        files = self._files()
        for path in files:
            try:
                write_atomically(path, text)
            except OSError:
                continue
            if path == files[0]:
                for left in files[1:]:
                    # From a time when the folder could not be written to; it would be read first.
                    with suppress(OSError):
                        left.unlink(missing_ok=True)
            return path
        return None

    def _read(self) -> list[np.ndarray]:
        # The last place first: it is only there while the first cannot be written to, and then it is the newer one.
        for path in reversed(self._files()):
            found = _parse(path, self._experts)
            if found is not None:
                return found
        return [np.zeros(count) for count in self._experts]


def _joined(before: np.ndarray, fresh: Sequence[int]) -> np.ndarray:
    return before * 0.5 ** (sum(fresh) / max(1, len(fresh)) / HALF_LIFE) + fresh


def _parse(path: Path, experts: tuple[int, ...]) -> list[np.ndarray] | None:
    """Return the counts in a file, None unless it holds exactly one finite count for each of these experts."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return None
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return None
    layers = content.get("counts")
    if not isinstance(layers, list) or len(layers) != len(experts):
        return None
    for layer, count in zip(layers, experts, strict=True):
        if not isinstance(layer, list) or len(layer) != count or not all(map(_is_count, layer)):
            return None
    return [np.array(layer, np.float64) for layer in layers]


def _is_count(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value <= 1e15 and math.isfinite(value)
