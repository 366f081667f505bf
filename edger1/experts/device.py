"""What waiting for a device costs: the one place where the host reads back what a GPU computed.

On an Apple GPU reading the router's choice back drains the queue: 1 to 2 ms a layer, beside about 0.4 ms of work. What
decides when to read back (`windows.py`) sees the device through this interface alone, so that a simulated one, whose
costs are set, drives the same code where there is no GPU.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np


class Device(Protocol):
    """Where a model computes, as seen by who waits for it."""

    def read_back(self, *arrays: Any) -> Any:
        """Wait until MLX arrays are computed; returns the NumPy array of one, or a list of those of several."""
        ...

    def finish(self) -> None:
        """Wait for everything that was begun."""
        ...

    def begin(self, array: Any) -> None:
        """Start to compute an array."""
        ...

    def wait_for(self, array: Any) -> None:
        """Wait until an array is computed."""
        ...

    def computed(self, layers: int) -> None:
        """Take note that so many decoder layers were given to the device."""
        ...

    def now(self) -> float:
        """Return the time in seconds."""
        ...


class _Computing:
    """What every device leaves to MLX."""

    def finish(self) -> None:
        """Wait for everything that was begun."""
        import mlx.core as mx

        mx.synchronize()

    def begin(self, array: Any) -> None:
        """Start to compute an array."""
        import mlx.core as mx

        mx.async_eval(array)

    def wait_for(self, array: Any) -> None:
        """Wait until an array is computed."""
        import mlx.core as mx

        mx.eval(array)


class MLXDevice(_Computing):
    """The device that MLX computes on, in real time. `reads_back` counts how often something waited for it."""

    def __init__(self) -> None:
        self.reads_back = 0

    def read_back(self, *arrays: Any) -> Any:
        """Wait for arrays, and return them; one as itself, several as a list."""
        import mlx.core as mx

        self.reads_back += 1
        mx.eval(*arrays)
        found = [np.array(array) for array in arrays]
        return found if len(found) > 1 else found[0]

    def computed(self, layers: int) -> None:
        """Do nothing: the device itself takes the time."""

    def now(self) -> float:
        """Return the clock's time in seconds."""
        return time.perf_counter()


class SimulatedDevice(_Computing):
    """A device on which a read-back costs `sync_s` and a decoder layer `compute_s`, in virtual time.

    Values are MLX's own, computed wherever MLX computes; only the time is made up. With `sleep` the clock is the real
    one, and what is charged is slept.
    """

    def __init__(self, sync_s: float, compute_s: float, *, sleep: bool = False) -> None:
        self.sync_s, self.compute_s, self._sleep = sync_s, compute_s, sleep
        self.read_backs = 0
        self.layers = 0

    def read_back(self, *arrays: Any) -> Any:
        """Return the arrays, and charge the cost of waiting once."""
        import mlx.core as mx

        mx.eval(*arrays)
        self.read_backs += 1
        self._charge(self.sync_s)
        found = [np.array(array) for array in arrays]
        return found if len(found) > 1 else found[0]

    def computed(self, layers: int) -> None:
        """Charge so many layers' work."""
        self.layers += layers
        self._charge(layers * self.compute_s)

    def now(self) -> float:
        """Return the virtual time in seconds: what was charged; with `sleep` the clock's."""
        if self._sleep:
            return time.perf_counter()
        return self.read_backs * self.sync_s + self.layers * self.compute_s

    def _charge(self, seconds: float) -> None:
        if self._sleep:
            time.sleep(seconds)
