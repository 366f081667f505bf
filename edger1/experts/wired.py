"""Keeps expert banks and resident weights wired on a Mac, and leaves the rest of the machine its memory.

macOS may page out what a GPU has not touched for a while, a bank's quiet slots first. MLX wires what it holds up to a
limit. mlx-lm sets that to the largest working set that the system recommends; a machine whose other programs also need
wired memory then stands still. Here the limit is what is held with a margin, and never the last part of what the system
recommends. Elsewhere nothing is done.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

MARGIN_BYTES = 256 * 2**20
"""Beyond what is held: activations and the KV cache's growth between two settings of the limit."""
_LEAST_RESERVE_BYTES = 2**30
_RESERVE_SHARE = 1 / 8


def wired_limit(held_bytes: int, recommended_bytes: int) -> int:
    """Return the limit in bytes for `held_bytes` of weights and banks, where the system recommends at most so much.

    A reserve of an eighth, or 1 GiB where that is more, always stays free; 0, MLX's default, where no more is there.
    """
    reserve = max(_LEAST_RESERVE_BYTES, int(recommended_bytes * _RESERVE_SHARE))
    return max(0, min(held_bytes + MARGIN_BYTES, recommended_bytes - reserve))


class Wired:
    """The process's wired limit, for what is held under several names; `close` puts back the limit that was there.

    For the thread that owns MLX.
    """

    def __init__(self, mx: Any = None) -> None:
        if mx is None:
            import mlx.core as mx
        self._mx = mx
        self._held: dict[str, int] = {}
        self._before: int | None = None
        self.limit_bytes: int | None = None
        """The limit in force, None where none was set."""
        self.reason = ""
        """Why none was set, where something is held."""

    def hold(self, name: str, nbytes: int) -> None:
        """Count `nbytes` under `name`, in place of what it had; 0 takes it out."""
        if nbytes:
            self._held[name] = nbytes
        else:
            self._held.pop(name, None)
        self._apply()

    def close(self) -> None:
        """Put the limit back to what it was."""
        self._held = {}
        if self._before is not None:
            # A change while something is computed may move what that reads.
            self._mx.synchronize()
            self._mx.set_wired_limit(self._before)
        self._before = self.limit_bytes = None

    def __enter__(self) -> Wired:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _apply(self) -> None:
        recommended = self._recommended()
        if recommended is None:
            self.reason = "this is not an Apple GPU"
            return
        if not self._held:
            self.close()
            return
        limit = wired_limit(sum(self._held.values()), recommended)
        if limit == self.limit_bytes:
            return
        self._mx.synchronize()
        try:
            before = self._mx.set_wired_limit(limit)
        except (RuntimeError, ValueError) as error:
            # A system whose own limit is set lower, or that knows no limit: what is held may then be paged out.
            self.reason = str(error)
            return
        self.reason = ""
        self.limit_bytes = limit
        if self._before is None:
            self._before = before

    def _recommended(self) -> int | None:
        if not self._mx.metal.is_available():
            return None
        found = self._mx.device_info().get("max_recommended_working_set_size")
        return int(found) if found else None
