"""The sides of `benchmarks.streaming`, each in a worker process: EdgeR1 (streamed or resident) and nunspark.

A reading is one greedy answer to a prompt of few words; what it must be is known (see `benchmarks.skewed_routing`), and
`recited` tells whether it was: 1, or 0 where the side computed another text and so used other experts.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cgroup import field, resident_of

if TYPE_CHECKING:
    # These run in nunspark's own environment.
    from nunspark.engine import StreamingEngine  # type: ignore[import-not-found]


class EdgeR1Streaming:
    """EdgeR1 through its public API, under a ceiling or with slots set by hand, or wholly resident without either."""

    def __init__(
        self,
        folder: str,
        precision: str,
        memory: int | None = None,
        expert_slots: str | int | None = None,
        context: int = 2048,
    ) -> None:
        import edger1

        given = {"memory": memory, "expert_slots": expert_slots}
        chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        began = time.perf_counter()
        self._model = edger1.load(folder, precision=precision, context=context, **chosen)
        plan = self._model.plan
        self._planned_bytes = plan.total_bytes
        self.info = {
            "kernels": self._model.info["kernels"],
            "load_s": time.perf_counter() - began,
            "planned_bytes": self._planned_bytes,
            "slots": plan.slots,
        }
        self._expert_bytes = 0
        self._watch()

    def __call__(self, prompt: str, generate: int, text: str) -> Mapping[str, float]:
        """Continue `prompt` by `generate` tokens after the first; `text` is what should come.

        Rates in tokens a second; hit_rate, bytes_per_token and stall_share are those of decoding. prefill_bytes is what
        EdgeR1 says that the prefill read, disk_bytes what the kernel says that the whole answer read from disks, and
        distinct_bytes the size of the distinct experts that the answer used. planned_bytes is what EdgeR1 says that it
        takes with a full context, peak_bytes the largest resident size, mapped files included, that the kernel saw;
        accounted_bytes is what EdgeR1 says that it holds at the end, resident_bytes what the kernel says.
        """
        self._used.clear()
        disk_bytes = _disk_bytes()
        done = self._model.generate(prompt, raw=True, max_tokens=generate + 1, temperature=0, seed=0, speculate="off")
        if done.usage.cached_tokens:
            raise RuntimeError(f"{done.usage.cached_tokens} tokens of the prompt came from a cache")
        figures = done.figures
        reading = {
            "rate": float(figures.decode_tokens_per_s or 0.0),
            "prefill": float(figures.prefill_tokens_per_s or 0.0),
            "planned_bytes": float(self._planned_bytes),
            "peak_bytes": float(resident_of().peak),
            "accounted_bytes": float(figures.accounted_memory_bytes),
            "resident_bytes": float(resident_of().rss),
            "recited": float(letters(done.text) == letters(text)),
            "completed": float(done.usage.completion_tokens),
        }
        experts = getattr(figures, "experts", None)
        if experts:
            reading |= _streamed(experts)
            reading["disk_bytes"] = float(_disk_bytes() - disk_bytes)
            reading["distinct_bytes"] = float(len(self._used) * self._expert_bytes)
        return reading

    def _watch(self) -> None:
        """Note the distinct experts that are used from here on: what the engine counts of them is in no message."""
        self._used: set[tuple[int, int]] = set()
        module = sys.modules.get("edger1.experts.streaming")
        if module is None:
            return
        for streaming in [held for held in gc.get_objects() if isinstance(held, module.Streaming)]:
            self._expert_bytes = streaming.banks[0].layer.expert_bytes
            counted = streaming.used

            def used(layer: int, experts: Sequence[int], *rest: Any, counted: Any = counted, **more: Any) -> Any:
                self._used.update((layer, int(expert)) for expert in experts)
                return counted(layer, experts, *rest, **more)

            streaming.used = used


def _disk_bytes() -> int:
    """Return what this process has read from disks, page cache not counted."""
    return field(Path("/proc/self/io").read_text(), "read_bytes")


def letters(text: str) -> str:
    """Return the ASCII letters and digits of a text: tokens may hold parts of other characters, shown in many ways."""
    return "".join(char for char in text if char.isascii() and char.isalnum())


def fresh(folder: Path, into: Path) -> Path:
    """Make `into` the model of `folder` as it was fetched, without what EdgeR1 has learnt of it; returns `into`."""
    for path in folder.iterdir():
        if path.name != "expert-popularity.json":
            (into / path.name).symlink_to(path.resolve())
    return into


def _streamed(experts: Mapping[str, Any]) -> dict[str, float]:
    decode, prefill = experts["decode"], experts["prefill"]
    # Where all experts have slots nobody asks which are there.
    return {
        "hit_rate": 1.0 if decode["hit_rate"] is None else float(decode["hit_rate"]),
        "bytes_per_token": float(decode["bytes_per_token"] or 0.0),
        "stall_share": float(decode["stall_share"] or 0.0),
        "prefill_bytes": float(prefill["bytes_read"]),
    }


class ReadRate:
    """What EdgeR1's store reads a second when nothing is computed: groups of random experts of one layer, cold."""

    def __init__(self, folder: str) -> None:
        from mlx_lm.utils import load_model

        from edger1.experts import anatomy  # type: ignore[import-not-found]
        from edger1.experts.store import Store  # type: ignore[import-not-found]
        from edger1.folder import inspect
        from edger1.mlx_runtime import prepare

        prepare()
        path = Path(folder)
        self._layers = anatomy.find(load_model(path, lazy=True)[0], inspect(path))
        self._store = Store(self._layers)

    def __call__(self, bytes_per_token: float, seconds: float = 3.0, seed: int = 0) -> Mapping[str, float]:
        """Read as many bytes for each layer of a token as decoding did, one layer after the other, for some seconds."""
        import numpy as np

        rng = np.random.default_rng(seed)
        expert_bytes = self._layers[0].expert_bytes
        mean = bytes_per_token / expert_bytes / len(self._layers)
        most = int(np.ceil(mean))
        buffers = [[np.zeros(part.nbytes, np.uint8) for part in self._layers[0].parts] for _ in range(most)]
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            for layer in self._layers:
                wanted = int(mean) + int(rng.random() < mean % 1)
                chosen = rng.choice(layer.experts, wanted, replace=False)
                reads = [self._store.read(layer, int(e), into) for e, into in zip(chosen, buffers, strict=False)]
                for read in reads:
                    read.wait()
                    if read.error is not None:
                        raise read.error
                count += wanted
        return {"bytes_per_s": count * expert_bytes / (time.perf_counter() - began)}


class Nunspark:
    """nunspark's engine through its own functions, as its command line sets it up."""

    def __init__(self, packed: str, settings: Mapping[str, Any]) -> None:
        from nunspark.engine import StreamingEngine
        from nunspark.manifest import Manifest  # type: ignore[import-not-found]

        root = Path(packed)
        self._engine: StreamingEngine = StreamingEngine(
            root,
            Manifest.load(root / "manifest.json"),
            budget_bytes=int(settings["budget_bytes"]),
            prefetch=settings["prefetch"],
            io_threads=settings["io_threads"],
            warm_window=settings["warm_window"],
            expert_cache_frac=settings["expert_share"],
            lookahead_prefetch=settings["lookahead"],
        )
        self._prefetch: bool = settings["prefetch"]
        self.info: dict[str, Any] = {}

    def __call__(self, prompt: Sequence[int], generate: int, tokens: Sequence[int]) -> Mapping[str, float]:
        """Continue the ids `prompt` by `generate` tokens after the first; `tokens` are those that should come."""
        from nunspark.generate import stream_generate  # type: ignore[import-not-found]

        cache = self._engine.cache
        began = time.perf_counter()
        stepping = stream_generate(
            self._engine, list(prompt), max_tokens=generate + 1, temp=0.0, prefetch=self._prefetch
        )
        made = [next(stepping)]
        first = time.perf_counter()
        before = cache.stats()
        for _ in range(generate):
            made.append(next(stepping))
        ended = time.perf_counter()
        after = cache.stats()
        hits, misses = (after[what]["expert"] - before[what]["expert"] for what in ("hits", "misses"))
        stepping.close()
        return {
            "rate": generate / (ended - first),
            "prefill": len(prompt) / (first - began),
            "hit_rate": hits / max(1, hits + misses),
            "peak_bytes": float(resident_of().peak),
            "recited": float(made == list(tokens)),
        }


def edger1(**arguments: Any) -> EdgeR1Streaming:
    """Set up EdgeR1."""
    return EdgeR1Streaming(**arguments)


def reads(**arguments: Any) -> ReadRate:
    """Set up EdgeR1's reads alone."""
    return ReadRate(**arguments)


def nunspark(packed: str, settings: str) -> Nunspark:
    """Set up nunspark; `settings` as JSON."""
    return Nunspark(packed, json.loads(settings))
