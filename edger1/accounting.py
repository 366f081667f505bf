"""What an engine holds by its own account, to be compared with what the system says of the process.

Weights, banks, caches and activations are MLX's memory, which counts itself, with the freed buffers that it keeps; the
kernels count what their threads compute in, and the caches that they have put on huge pages. Everything else (Python,
libraries, the tokenizer, readers and their buffers) is measured once, when a model has been loaded and before it
answers.
"""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path


class Account:
    """The account of one process; `process_bytes` is what did not count itself when this was made."""

    def __init__(self) -> None:
        from edger1.mlx_runtime import on_gpu

        # Memory of a GPU is no part of the resident size.
        self.process_bytes = resident_bytes() if on_gpu() else max(0, resident_bytes() - _counted_bytes())

    def nbytes(self) -> int:
        """Return the bytes that are held now."""
        return self.process_bytes + _counted_bytes()


def resident_bytes() -> int:
    """Return what the system has in memory for this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_memory_bytes() -> int:
    """Peak memory of this process: resident size, or what MLX has allocated where that is more (GPU memory)."""
    import mlx.core as mx

    return max(_peak_resident_bytes(), int(mx.get_peak_memory()))


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        # getrusage gives a process the peak of the one that started it, where that was larger.
        with suppress(OSError), Path("/proc/self/status").open(encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _counted_bytes() -> int:
    import mlx.core as mx

    from edger1 import kernels

    extension = kernels.extension()
    kernels_own = 0 if extension is None else int(extension.scratch_bytes() + extension.cache_room_bytes())
    return int(mx.get_active_memory() + mx.get_cache_memory()) + kernels_own
