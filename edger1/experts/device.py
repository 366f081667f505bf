"""What waiting for a device costs: the one place where the host reads back what a GPU computed.

On an Apple GPU reading the router's choice back drains the queue: 1 to 2 ms a layer, beside about 0.4 ms of work. What
decides when to read back (`windows.py`) sees the device through this interface alone, so that a simulated one, whose
costs are set, drives the same code where there is no GPU.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt


class Device(Protocol):
    """Where a model computes, as seen by who waits for it."""

    def read_back(self, array: Any) -> npt.NDArray[Any]:
        """Wait until an MLX array is computed and return it as a NumPy array."""
        ...

    def computed(self, layers: int) -> None:
        """Take note that so many decoder layers were given to the device."""
        ...

    def now(self) -> float:
        """Return the time in seconds."""
        ...


class MLXDevice:
    """The device that MLX computes on, in real time."""

    def read_back(self, array: Any) -> npt.NDArray[Any]:
        """Wait for the array, and return it."""
        import mlx.core as mx

        mx.eval(array)
        return np.array(array)

    def computed(self, layers: int) -> None:
        """Do nothing: the device itself takes the time."""

    def now(self) -> float:
        """Return the clock's time in seconds."""
        return time.perf_counter()


class SimulatedDevice:
    """A device on which a read-back costs `sync_s` and a decoder layer `compute_s`, in virtual time.

    Values are MLX's own, computed wherever MLX computes; only the time is made up. With `sleep` the clock is the real
    one, and what is charged is slept.
    """

    def __init__(self, sync_s: float, compute_s: float, *, sleep: bool = False) -> None:
        self.sync_s, self.compute_s, self._sleep = sync_s, compute_s, sleep
        self.read_backs = 0
        self.layers = 0

    def read_back(self, array: Any) -> npt.NDArray[Any]:
        """Return the array, and charge the cost of waiting for it."""
        import mlx.core as mx

        mx.eval(array)
        self.read_backs += 1
        self._charge(self.sync_s)
        return np.array(array)

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
