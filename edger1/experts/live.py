"""What streaming is doing at the moment: hits, misses and the experts used, counted since it was last asked.

All of it is counted anyway; asking compares the counts with those of the last time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edger1.experts.figures import HITS, MISSES

if TYPE_CHECKING:
    from edger1.experts.streaming import Streaming


class Watch:
    """The counts of one model since the last `layers`."""

    def __init__(self, streaming: Streaming) -> None:
        self._streaming = streaming
        self._figures = streaming.figures[:, [HITS, MISSES]].copy()
        self._uses = streaming.uses()

    def layers(self) -> list[dict[str, Any]]:
        """Return for each layer {"layer": index, "hits": n, "misses": n, "experts": {expert: uses}}."""
        figures, uses = self._streaming.figures[:, [HITS, MISSES]].copy(), self._streaming.uses()
        counts = (figures - self._figures).astype(int).tolist()
        told = [
            {
                "layer": bank.layer.index,
                "hits": hits,
                "misses": misses,
                "experts": {e: a - b for e, (a, b) in enumerate(zip(now, before, strict=True)) if a > b},
            }
            for bank, (hits, misses), now, before in zip(self._streaming.banks, counts, uses, self._uses, strict=True)
        ]
        self._figures, self._uses = figures, uses
        return told
