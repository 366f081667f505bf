"""Reading what the next layer will probably ask for: its router, applied early to what this layer's router was given.

The stream of hidden states changes little from one layer to the next, so the next router mostly chooses the same from
this layer's input as it will from its own. What it names and is not there is read behind everything that is waited for,
and given up if the layer comes and has chosen others.

A guess costs bandwidth, and on a machine whose processor has to copy what is read, time of the same cores that compute.
Whether it pays is not known beforehand, so it is tried: tokens with and without it, in turns, and the faster way stays
until the next trial (`Trial`).
"""

from __future__ import annotations

from statistics import median


class Trial:
    """Decides by trying whether something is on. `note` is told how long each token took."""

    def __init__(self, span: int = 8, rounds: int = 3, again: int = 2048, gain: float = 0.02) -> None:
        """Try for `rounds` times `span` tokens with and without it; again after `again` tokens.

        On stays only what saves a share of `gain` of the time of a token.
        """
        self.on = False
        self._span, self._rounds, self._again, self._gain = span, rounds, again, gain
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._left = span
        self._trying = True

    @property
    def trying(self) -> bool:
        """Whether a trial is under way."""
        return self._trying

    def note(self, seconds: float) -> None:
        """Take note of a token, computed the way that `on` said."""
        self._left -= 1
        if not self._trying:
            if self._left <= 0:
                self._seconds = {True: [], False: []}
                self._trying, self._left = True, self._span
            return
        # The first after a change finds what the other way has left.
        if self._left < self._span - 1:
            self._seconds[self.on].append(seconds)
        if self._left > 0:
            return
        needed = self._rounds * (self._span - 1)
        if all(len(taken) >= needed for taken in self._seconds.values()):
            self.on = median(self._seconds[True]) <= (1 - self._gain) * median(self._seconds[False])
            self._trying, self._left = False, self._again
        else:
            self.on, self._left = not self.on, self._span
