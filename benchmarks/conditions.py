"""How the machine was while it was measured: its read bandwidth, and what was taken from it.

Neighbours on a shared machine take memory bandwidth and processor time without a trace in a median. A result keeps the
bandwidth read between the rounds and the share of processor time that the hypervisor gave to others ("steal"), so that
a disturbed one is recognised and its part measured again.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from benchmarks import bandwidth
from benchmarks.peers import PeerMissingError

BUFFER_BYTES = 1 << 30  # above the caches of any machine this runs on, so that memory is what is read


class Conditions:
    """Watches the machine during one part of a benchmark."""

    def __init__(self, threads: int) -> None:
        self._stolen, self._total = _processor_time()
        self._rates: list[float] = []
        self._missing = ""
        self._memory: bandwidth.ReadBandwidth | None = None
        try:
            self._memory = bandwidth.ReadBandwidth(BUFFER_BYTES, threads)
        except PeerMissingError as error:
            self._missing = str(error)

    def sample(self) -> float:
        """Read the memory's bandwidth once more (a tenth of a second); returns GB/s, NaN where it cannot be read."""
        if self._memory is None:
            return math.nan
        self._rates.append(max(self._memory.read() for _ in range(3)) / 1e9)
        return self._rates[-1]

    def close(self) -> dict[str, Any]:
        """Return what was seen, in plain JSON values, and give the buffer back."""
        if self._memory is not None:
            self._memory.close()
        stolen, total = _processor_time()
        seen: dict[str, Any] = {"read_bandwidth_gb_s": [round(rate, 2) for rate in self._rates]}
        if self._missing:
            seen["read_bandwidth_missing"] = self._missing
        if total > self._total:
            seen["stolen_share"] = round((stolen - self._stolen) / (total - self._total), 4)
        print(f"  conditions: {seen}", file=sys.stderr, flush=True)
        return seen


def _processor_time() -> tuple[int, int]:
    """Return (time stolen by the hypervisor, all time) of all processors since the start, in ticks; zeros off Linux."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0, 0
    ticks = [int(word) for word in stat.read_text().splitlines()[0].split()[1:]]
    return ticks[7], sum(ticks[:8])
