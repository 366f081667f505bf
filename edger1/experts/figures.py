"""What streaming did: counted for each layer, told for a request's prefill and its decoding."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edger1.experts.streaming import Streaming

Table = npt.NDArray[np.float64]
COLUMNS = ("calls", "hits", "misses", "bytes_read", "stall_s", "compute_s", "guesses", "on_map")
"""Columns of a table of figures [layers, columns]. `hits` and `misses` count the distinct experts of each call,
`stall_s` is how long a layer stood still because an expert was not there, `compute_s` all else since the layer before
it, `guesses` how many experts were read before the layer asked for them, `on_map` how many of the misses were computed
where they lie, since the page cache had them."""
CALLS, HITS, MISSES, BYTES_READ, STALL_S, COMPUTE_S, GUESSES, ON_MAP = range(len(COLUMNS))


def empty(layers: int) -> Table:
    """Return a table of zeros."""
    return np.zeros((layers, len(COLUMNS)))


def added_up(table: Table, tokens: int) -> dict[str, Any]:
    """Add a table up over its layers, as plain JSON values; `tokens` went through them."""
    _, hits, misses, nbytes, stall, compute, guesses, on_map = (float(value) for value in table.sum(axis=0))
    return {
        "tokens": tokens,
        "hit_rate": hits / (hits + misses) if hits + misses else None,
        "bytes_read": int(nbytes),
        "bytes_per_token": nbytes / tokens if tokens else None,
        "stall_s": stall,
        "compute_s": compute,
        "stall_share": stall / (stall + compute) if stall + compute else None,
        "guesses": int(guesses),
        "on_map": int(on_map),
    }


class Account:
    """What streaming took for one request, among others that run in turns with it."""

    def __init__(self, streaming: Streaming) -> None:
        self._streaming = streaming
        self._tables = {name: empty(len(streaming.banks)) for name in ("prefill", "decode")}
        self._phase: str | None = None
        self._before = self._tables["decode"]

    @contextlib.contextmanager
    def counting(self, *, decoding: bool) -> Iterator[None]:
        """Count what happens inside as this request's."""
        self._phase = "decode" if decoding else "prefill"
        self._before = self._streaming.figures.copy()
        began = self._streaming.begin()
        try:
            yield
            if decoding:
                self._streaming.prefetch.note(time.perf_counter() - began)
        finally:
            self._take()
            self._phase = None

    def summary(self, prefilled: int, decoded: int, *, by_layer: bool = True) -> dict[str, Any]:
        """Return it as plain JSON values:

        "prefill", "decode"    as `added_up` has them, for the tokens given
        "layers"               of decoding, a table of COLUMNS a layer; left out unless `by_layer`
        "slots", "experts"     of each layer
        """
        self._take()
        layers = [
            dict(zip(COLUMNS, (round(float(value), 6) for value in row), strict=True))
            for row in (self._tables["decode"] if by_layer else ())
        ]
        return {
            "prefill": added_up(self._tables["prefill"], prefilled),
            "decode": added_up(self._tables["decode"], decoded),
            **({"layers": layers} if by_layer else {}),
            "slots": [bank.usable_slots for bank in self._streaming.banks],
            "experts": [bank.layer.experts for bank in self._streaming.banks],
        }

    def _take(self) -> None:
        if self._phase is not None:
            now = self._streaming.figures.copy()
            new = now - self._before
            self._tables[self._phase] += new
            self._before = now
            costs = self._streaming.miss_costs
            if costs is not None and self._phase == "decode":
                costs.add(new[:, MISSES].tolist(), new[:, STALL_S].tolist())
