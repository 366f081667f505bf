"""What the engine did in this session: the live figures of its answers, in little memory. Knows nothing of screens.

Figures come about twice a second while an answer is decoded (`edger1.messages.Running`). They are added up in buckets
of time; when there are `BUCKETS_MAX`, neighbours are joined and buckets get twice as long, so a day of decoding costs
no more memory than a minute. Only time in which an answer was decoded is counted, and buckets follow each other without
the pauses between answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edger1.messages import Figures, Running

BUCKETS_MAX = 240
BUCKET_S = 1.0
"""Seconds of decoding in a bucket, at first."""


@dataclass
class Bucket:
    """What happened in a stretch of decoding."""

    begin: float
    """Unix seconds of its first figures."""
    end: float
    seconds: float = 0.0
    tokens: float = 0.0
    memory_bytes: int = 0
    """The most that was held."""
    ceiling_bytes: int = 0
    context_used: int = 0
    bytes_read: float = 0.0
    stall_s: float = 0.0
    compute_s: float = 0.0
    hits: list[int] = field(default_factory=list)
    """Of each streamed layer."""
    misses: list[int] = field(default_factory=list)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second of decoding."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    @property
    def memory_share(self) -> float | None:
        """Memory as a share of the ceiling."""
        return self.memory_bytes / self.ceiling_bytes if self.ceiling_bytes else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts asked for that were in their slots, over all layers."""
        hits, misses = sum(self.hits), sum(self.misses)
        return hits / (hits + misses) if hits + misses else None

    @property
    def stall_share(self) -> float | None:
        """Share of the time that layers stood still for an expert."""
        return self.stall_s / (self.stall_s + self.compute_s) if self.stall_s + self.compute_s else None

    def cell(self, row: int) -> tuple[int, int]:
        """Return hits and misses of a layer's row."""
        return (self.hits[row], self.misses[row]) if row < len(self.hits) else (0, 0)

    def take(self, later: Bucket) -> None:
        """Add what happened in a later bucket."""
        self.end = max(self.end, later.end)
        for name in ("seconds", "tokens", "bytes_read", "stall_s", "compute_s"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        self.memory_bytes = max(self.memory_bytes, later.memory_bytes)
        self.ceiling_bytes = later.ceiling_bytes or self.ceiling_bytes
        self.context_used = later.context_used or self.context_used
        self.hits = _added(self.hits, later.hits)
        self.misses = _added(self.misses, later.misses)


class History:
    """The figures of a session. `watch` tells whoever shows them that there are new ones."""

    def __init__(self) -> None:
        self._watchers: list[Callable[[], None]] = []
        self._begin()

    def _begin(self) -> None:
        self.buckets: list[Bucket] = []
        self.layers: list[int] = []
        """Index in the model of each row, in the order of rows; empty where no experts are streamed."""
        self.uses: list[dict[int, int]] = []
        """Of each row: how often each expert was used."""
        self.experts = 0
        """Experts of a layer."""
        self.latest: Figures | None = None
        self._bucket_s = BUCKET_S
        self._answer = ""
        self._seen_at = 0.0
        self._decoded: Mapping[str, Any] = {}

    @property
    def streamed(self) -> bool:
        """Whether experts are streamed, so that hits and misses mean something."""
        return bool(self.layers)

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call `changed` after every change, until what is returned is called."""
        self._watchers.append(changed)
        return lambda: self._watchers.remove(changed) if changed in self._watchers else None

    def clear(self) -> None:
        """Forget all: another model has been loaded."""
        self._begin()
        self._tell()

    def add(self, running: Running, at: float) -> None:
        """Take the figures of a running answer, which came at `at` (Unix seconds)."""
        figures = running.figures
        new_answer = running.id != self._answer
        # What an answer did before its first figures is not known by time: they open the account.
        seconds = 0.0 if new_answer else min(max(at - self._seen_at, 0.0), 10.0)
        self._answer, self._seen_at, self.latest = running.id, at, figures
        piece = Bucket(at, at, seconds, seconds * (figures.decode_tokens_per_s or 0.0))
        piece.memory_bytes = figures.accounted_memory_bytes or figures.peak_memory_bytes
        piece.ceiling_bytes = figures.ceiling_bytes
        piece.context_used = figures.context_used
        self._add_decode(piece, (figures.experts or {}).get("decode") or {}, new_answer)
        self._add_layers(piece, running.layers or [], (figures.experts or {}).get("experts") or [])
        if not self.buckets or self.buckets[-1].seconds >= self._bucket_s:
            self.buckets.append(piece)
        else:
            self.buckets[-1].take(piece)
        if len(self.buckets) > BUCKETS_MAX:
            self._join()
        self._tell()

    def ranked(self, row: int) -> list[tuple[int, int]]:
        """Return (expert, uses) of a row, the most used first."""
        return sorted(self.uses[row].items(), key=lambda each: (-each[1], each[0]))

    def series(self, name: str) -> list[float | None]:
        """Return a property of each bucket, the oldest first."""
        return [getattr(bucket, name) for bucket in self.buckets]

    def _add_decode(self, piece: Bucket, decode: Mapping[str, Any], new_answer: bool) -> None:
        """Put what an answer's sums have grown by since its last figures into a piece."""
        before = {} if new_answer else self._decoded
        for name in ("stall_s", "compute_s", "bytes_read"):
            setattr(piece, name, max((decode.get(name) or 0) - (before.get(name) or 0), 0))
        self._decoded = decode

    def _add_layers(self, piece: Bucket, layers: list[dict[str, Any]], experts: list[int]) -> None:
        indices = [int(layer["layer"]) for layer in layers]
        if layers and indices != self.layers:
            self.layers = indices
            self.uses = [{} for _ in indices]
            self.buckets = []
        for row, layer in enumerate(layers):
            piece.hits.append(int(layer["hits"]))
            piece.misses.append(int(layer["misses"]))
            uses = self.uses[row]
            for expert, times in layer["experts"].items():
                uses[int(expert)] = uses.get(int(expert), 0) + int(times)
                self.experts = max(self.experts, int(expert) + 1)
        self.experts = max([self.experts, *experts])

    def _join(self) -> None:
        for first, second in zip(self.buckets[::2], self.buckets[1::2], strict=False):
            first.take(second)
        self.buckets = self.buckets[::2]
        self._bucket_s *= 2

    def _tell(self) -> None:
        for changed in list(self._watchers):
            changed()


def _added(one: Sequence[int], other: Sequence[int]) -> list[int]:
    if not one or not other:
        return list(one or other)
    return [a + b for a, b in zip(one, other, strict=True)]
