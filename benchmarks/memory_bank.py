"""Banks without a disk: a model's experts stay in memory, and are copied into slots as if they had been read.

For what concerns waiting for a device, not reading from a disk.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from edger1.experts.device import Device
from edger1.experts.windows import Windows, install


class Lru:
    """Evicts who was used the longest ago."""

    def __init__(self, experts: int) -> None:
        self._last, self._now = [0] * experts, 0

    def use(self, experts: Sequence[int], scores: Any = None) -> None:
        self._now += 1
        for expert in experts:
            self._last[expert] = self._now

    def victim(self, resident: Collection[int], keep: Collection[int]) -> int | None:
        return min((e for e in resident if e not in keep), key=self._last.__getitem__, default=None)


class MemoryBank:
    """Slots of one switch layer. Its stacked arrays become those of the slots, full of what is no expert's."""

    def __init__(self, switch: Any, slots: int) -> None:
        linears = [linear for linear in switch.children().values() if hasattr(linear, "num_experts")]
        self.experts = linears[0].num_experts
        self.policy = Lru(self.experts)
        self.table = np.full(self.experts, -1, np.int32)
        self.brought = 0
        self._switch, self._sources, self._rows = switch, [], []
        for linear in linears:
            for name, source in linear.items():
                if isinstance(source, mx.array):
                    garbage = float("nan") if mx.issubdtype(source.dtype, mx.floating) else 0x5A
                    array = mx.full((slots, *source.shape[1:]), garbage, source.dtype)
                    mx.eval(source, array)
                    linear[name] = array
                    self._sources.append((linear, name, source))
                    self._rows.append((_view(source), _view(array)))
        self._free = list(range(slots))

    def ensure(self, experts: Sequence[int], keep: Collection[int] = ()) -> None:
        wanted = {*experts, *keep}
        for expert in experts:
            if self.table[expert] >= 0:
                continue
            if self._free:
                slot = self._free.pop()
            else:
                leaving = self.policy.victim(np.flatnonzero(self.table >= 0).tolist(), wanted)
                assert leaving is not None, "more experts at once than there are slots"
                slot, self.table[leaving] = int(self.table[leaving]), -1
            for source, rows in self._rows:
                rows[slot] = source[expert]
            self.table[expert] = slot
            self.brought += 1

    def with_all(self, call: Any) -> Any:
        """Return what `call` gives while the layer has all its experts, without slots."""
        slots = [linear[name] for linear, name, _ in self._sources]
        try:
            for linear, name, source in self._sources:
                linear[name] = source
            return call()
        finally:
            for (linear, name, _), array in zip(self._sources, slots, strict=True):
                linear[name] = array


def _view(array: Any) -> Any:
    """Return MLX's memory as a NumPy array; NumPy has no bfloat16."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def switches(model: Any) -> list[Any]:
    """Return a model's switch layers in the order they are called."""
    return [m for layer in model.layers for m in layer.modules() if isinstance(m, SwitchGLU | SwitchMLP)]


def stream(model: Any, slots: int, device: Device) -> tuple[Windows, list[MemoryBank]]:
    """Give each MoE layer of a model a bank of slots, and let it run in windows."""
    found = switches(model)
    banks = [MemoryBank(switch, slots) for switch in found]
    windows = install(model, found, banks, device)
    for layer, (switch, bank) in enumerate(zip(found, banks, strict=True)):
        _stand_in(switch, layer, bank, windows)
    return windows, banks


def _stand_in(switch: Any, layer: int, bank: MemoryBank, windows: Windows) -> None:
    original: Any = type(switch)

    def call(self: Any, x: Any, indices: Any) -> Any:
        slots = windows.slots(layer, indices)
        if slots is None:
            return bank.with_all(lambda: original.__call__(self, x, indices))
        return original.__call__(self, x, slots)

    switch.__class__ = type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})
