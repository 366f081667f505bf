"""Tries streaming on this machine with the model that comes with EdgeR1: part of `edger1 doctor --selftest`.

Three things are worth knowing of a machine that nobody here has, a Mac above all: whether slots that are overwritten
while MLX has work to do ever show the wrong bytes, whether streamed output is resident output there, and what reading
back a router's choice and reading experts cost. The answer is plain JSON. Runs on the thread that owns MLX.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "nano-moe"
_ROUNDS = 200
_TOKENS = 64


def selftest(quick: bool = False) -> dict[str, Any]:
    """Return {"ok", "slot_writes", "exactness", "read_back_us", "speed"}; `quick` leaves the speeds out."""
    from edger1 import installed

    folder = installed.resolve(MODEL)
    writes = slot_writes(20 if quick else _ROUNDS)
    exact = exactness(folder)
    report: dict[str, Any] = {
        "ok": writes["wrong"] == 0 and all(exact.values()),
        "model": MODEL,
        "slot_writes": writes,
        "exactness": exact,
        "read_back_us": read_back_us(),
    }
    if not quick:
        report["speed"] = speed(folder)
    return report


def slot_writes(rounds: int) -> dict[str, Any]:
    """Overwrite slots between operations that read them, as a layer does, and count results with the wrong bytes.

    Each round asks for two of eight experts in a bank of three slots, computes with them, and goes on without waiting
    for the result. Expert e holds nothing but e + 1, so that every result is known.
    """
    import mlx.core as mx

    from edger1.experts.anatomy import LayerExperts, Part
    from edger1.experts.bank import Bank
    from edger1.experts.device import MLXDevice
    from edger1.experts.policy import LRU
    from edger1.experts.store import Store

    size, experts = 64 << 10, 8
    device, chooser = MLXDevice(), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experts"
        np.repeat(np.arange(1, experts + 1, dtype=np.float32), size).tofile(file)
        part = Part("up_proj", "weight", file, 0, 4 * size, (size,), "F32")
        layer = LayerExperts(0, "layer", experts, 2, (part,))
        store = Store([layer])
        bank = Bank(layer, 3, store, LRU(experts))
        slots, results = bank.arrays["up_proj", "weight"], []
        for _ in range(rounds):
            chosen = chooser.choice(experts, 2, replace=False)
            # The next round's choice is known only when the one before is computed, as a router's is.
            device.read_back(mx.array(chosen))
            bank.settle()
            bank.policy.use(chosen.tolist())
            if (bank.table[chosen] < 0).any():
                device.finish()
                bank.ensure(chosen.tolist())
            found = slots[mx.array(bank.table[chosen])]
            results.append((chosen, found.min(axis=1), found.max(axis=1)))
            device.begin(results[-1][2])
        wrong = sum(
            not (np.array(low) == chosen + 1).all() or not (np.array(high) == chosen + 1).all()
            for chosen, low, high in results
        )
        store.close()
    return {"rounds": rounds, "wrong": int(wrong)}


def exactness(folder: Path) -> dict[str, bool]:
    """Return for each precision whether the model's certificate holds."""
    from edger1.experts.verify import verify

    return {precision: verify(folder, precision=precision).holds for precision in ("exact", "fast")}


def read_back_us() -> float:
    """Return the median time of reading back a small array that an operation has just made, in microseconds."""
    import mlx.core as mx

    from edger1.experts.device import MLXDevice

    device, array, taken = MLXDevice(), mx.zeros((1, 8), mx.int32), []
    for _ in range(200):
        array = array + 1
        began = time.perf_counter()
        device.read_back(array)
        taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken)


def speed(folder: Path) -> dict[str, Any]:
    """Return tokens a second of greedy decoding, resident and with shares of the experts in slots, and hit rates."""
    from edger1.loader import load

    found: dict[str, Any] = {}
    for slots in (None, "100%", "50%", "25%"):
        steps = load(MODEL, folder, ceiling_bytes=1 << 40, context=512, precision="fast", expert_slots=slots)
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            model = stop.value
        try:
            found["resident" if slots is None else f"{slots} in slots"] = _decode(model)
        finally:
            model.close()
    return found


def _decode(model: Any) -> dict[str, Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from edger1.experts.figures import HITS, MISSES

    cache, token, taken = make_prompt_cache(model.model), mx.array([[1]]), []
    for _ in range(_TOKENS):
        began = time.perf_counter()
        token = mx.argmax(model.model(token, cache=cache)[:, -1], axis=-1)[None]
        mx.eval(token)
        taken.append(time.perf_counter() - began)
    result: dict[str, Any] = {"tokens_per_s": round(1 / statistics.median(taken), 1)}
    if model.streaming is not None:
        hits, misses = (float(model.streaming.figures[:, column].sum()) for column in (HITS, MISSES))
        counts = model.streaming.store.counts
        result |= {"hit_rate": hits / (hits + misses) if hits + misses else None}
        result |= {"bytes_read": counts.nbytes, "seconds_reading": round(counts.busy_s, 4)}
    return result
