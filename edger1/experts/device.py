"""The device that MLX computes on, as far as streaming has to wait for it."""

from __future__ import annotations

from typing import Any

import numpy as np


class Device:
    """MLX's own. `reads_back` counts how often something waited for it."""

    def __init__(self) -> None:
        self.reads_back = 0

    def read_back(self, *arrays: Any) -> list[Any]:
        """Wait for arrays and for all that was begun before them; returns them for NumPy."""
        import mlx.core as mx

        self.reads_back += 1
        mx.eval(*arrays)
        return [np.array(array) for array in arrays]

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
