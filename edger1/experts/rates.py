"""What this machine reads a second: experts from the model's disk, and weights in memory by the kernels.

Both are measured in well under a second each, for each machine, disk and kind of weights, and kept for a day in
rates.json in the data folder. The disk is read as streaming reads it, experts picked at random, past the page cache
where the file system lets it: the rate is that of a cold start, and what the page cache holds comes faster.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edger1 import paths
from edger1.experts.anatomy import LayerExperts
from edger1.experts.store import THREADS, Bytes, Read, Store, StreamError
from edger1.fetch.place import write_atomically

VERSION = 1
# A rate taken while other programs kept the machine busy should not stay for ever.
_KEPT_S = 24 * 3600
_DISK_S = 0.5
_KERNEL_S = 0.3
_PATIENCE_S = 10
# Matrices enough that no cache holds them: 105 MB at 4 bits.
_MATRICES, _SIZE = 12, 4096


def disk_rate(layers: Sequence[LayerExperts]) -> float | None:
    """Return bytes a second of reading experts of `layers` at random; None where they cannot be read.

    Kept for each device and size of expert.
    """
    try:
        device = layers[0].parts[0].file.stat().st_dev
    except OSError:
        return None
    # To a power of two: a little more or less to an expert changes nothing.
    size = layers[0].expert_bytes.bit_length()
    return _kept(f"disk {platform.node()} {device} 2^{size}", lambda: measure_disk(layers))


def weight_rate(quantization: Mapping[str, Any] | None, precision: str = "fast") -> float:
    """Return bytes a second of weights that one row is multiplied with; runs on the thread that owns MLX.

    `quantization` is config.json's, None for weights of 16 bits.
    """
    from edger1 import kernels

    bits, group = 16, 0
    if quantization is not None:
        asked: tuple[Any, Any] = quantization.get("bits"), quantization.get("group_size")
        bits, group = asked if asked[0] in (2, 3, 4, 5, 6, 8) and asked[1] in (32, 64, 128) else (4, 64)
    threads = os.environ.get("EDGER1_THREADS", os.cpu_count())
    sets = "+".join(kernels.state().instruction_sets) or "mlx"
    key = f"weights {platform.node()} {sets} {threads} threads {bits} bits/{group} {precision}"
    return _kept(key, lambda: measure_weights(bits, group, precision)) or 1e9


def measure_disk(layers: Sequence[LayerExperts], seconds: float = _DISK_S) -> float | None:
    """Read whole experts at random for `seconds`, a few under way at once; return bytes a second."""
    chooser = random.Random()
    parts = max(len(layer.parts) for layer in layers)
    largest = max(part.nbytes for layer in layers for part in layer.parts)
    free = [np.empty((parts, largest), np.uint8) for _ in range(THREADS)]
    under_way: collections.deque[tuple[Read, Bytes]] = collections.deque()
    try:
        store = Store(layers, mode="direct")
    except StreamError:
        return None
    done, began = 0, time.perf_counter()
    try:
        while done == 0 or time.perf_counter() < began + seconds:
            while free:
                layer, memory = chooser.choice(layers), free.pop()
                into = [row[: part.nbytes] for row, part in zip(memory, layer.parts, strict=False)]
                under_way.append((store.read(layer, chooser.randrange(layer.experts), into), memory))
            read, memory = under_way.popleft()
            # A disk that hangs has no rate.
            if not read.wait(_PATIENCE_S) or read.error is not None:
                break
            done += read.layer.expert_bytes
            free.append(memory)
        return done / (time.perf_counter() - began) if done else None
    finally:
        store.close()


def measure_weights(bits: int, group: int, precision: str, seconds: float = _KERNEL_S) -> float:
    """Multiply one row with matrices of `bits` bits, more of them than caches hold; return bytes of them a second."""
    import mlx.core as mx

    from edger1.kernels.quantized import quantized_matmul

    x = mx.ones((1, _SIZE))
    if bits == 16:
        matrices: list[tuple[Any, ...]] = [(mx.zeros((_SIZE, _SIZE), mx.bfloat16),) for _ in range(_MATRICES // 3)]
    else:
        packed, groups = (_SIZE, _SIZE * bits // 32), (_SIZE, _SIZE // group)
        matrices = [
            (mx.zeros(packed, mx.uint32), mx.ones(groups, mx.bfloat16), mx.zeros(groups, mx.bfloat16))
            for _ in range(_MATRICES)
        ]
    mx.eval(x, matrices)

    def compute(some: Sequence[tuple[Any, ...]]) -> None:
        if bits == 16:
            mx.eval([_matmul(x, w.T) for (w,) in some])
        else:
            shape: dict[str, Any] = {"group_size": group, "bits": bits, "precision": precision}
            mx.eval([quantized_matmul(x, w, scales, biases, **shape) for w, scales, biases in some])

    best, began = 0.0, time.perf_counter()
    for i in itertools.count():
        some = [matrices[(2 * i + j) % len(matrices)] for j in range(2)]
        before = time.perf_counter()
        compute(some)
        now = time.perf_counter()
        # The fastest counts: what slows the others down is other programs.
        best = max(best, sum(array.nbytes for each in some for array in each) / (now - before))
        if now - began > seconds:
            break
    return best


def _matmul(x: Any, w: Any) -> Any:
    from edger1.kernels import _load

    extension = _load()[0]
    return x @ w if extension is None else extension.matmul(x, w)


def _file() -> Path:
    return paths.data() / "rates.json"


def _kept(key: str, measure: Callable[[], float | None]) -> float | None:
    """Return the rate kept under `key`, else what `measure` returns, which is then kept; no failure to keep is one."""
    found = _all().get(key)
    if found is not None and 0 <= time.time() - found["when"] < _KEPT_S:
        return float(found["bytes_per_s"])
    measured = measure()
    if measured is None:
        return None
    entry = {"bytes_per_s": round(measured), "when": int(time.time())}
    with contextlib.suppress(OSError):
        write_atomically(_file(), json.dumps({"version": VERSION, "rates": _all() | {key: entry}}, indent=2) + "\n")
    return measured


def _all() -> dict[str, Any]:
    """Return what was kept and is sound."""
    try:
        content: Any = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION or not isinstance(content.get("rates"), dict):
        return {}
    return {key: entry for key, entry in content["rates"].items() if _is_sound(entry)}


def _is_sound(entry: Any) -> bool:
    numbers: list[Any] = [entry.get(name) for name in ("bytes_per_s", "when")] if isinstance(entry, dict) else []
    # NaN is neither above nor below anything.
    return bool(numbers) and all(type(n) in (int, float) and 0 < n < 1e15 for n in numbers)
