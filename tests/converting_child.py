"""A process that converts a fake source slowly, for the tests to kill: python converting_child.py FOLDER."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from converting_fakes import FakeSource, FakeTensor, fake_model

from edger1.quant import planning, running
from edger1.quant.converting import Settings, convert
from edger1.quant.recipes import uniform

SHARD_BYTES = 150_000


def convert_in_pieces(source: FakeSource, folder: Path) -> None:
    """Convert with small windows that are journaled often."""
    planning.WINDOW_BYTES, running.SYNC_BYTES = 1 << 15, 20_000
    convert(source, fake_model(source), folder / "model", uniform(4), Settings(threads=2, shard_bytes=SHARD_BYTES))


class SlowTensor(FakeTensor):
    """Takes a while for each read, as a disk does."""

    def read(self, start: int, stop: int) -> np.ndarray:
        time.sleep(0.004)
        return super().read(start, stop)


if __name__ == "__main__":
    slow = FakeSource()
    for tensor in slow.tensors.values():
        tensor.__class__ = SlowTensor
    print("begun", flush=True)
    convert_in_pieces(slow, Path(sys.argv[1]))
    print("ended", flush=True)
