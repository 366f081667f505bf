"""Memory that a chunk of a prompt takes in DeepSeek-R1's attention, beside weights and cache: one layer.

    python -m benchmarks.latent_memory                  # everything; one or two readings each, half an hour in all
    python -m benchmarks.latent_memory --only kernels   # one part: kernels, plain, without
    python -m benchmarks.latent_memory --quick          # short contexts, to see that all of it runs

512 tokens pass the layer at 4 bits (128 heads, latent of 512, rope 64, nope and value 128, queries of rank 1,536) after
4,096 and after 16,384 others: projections and what the cache grows by included, the mask not, which a model's layers
share (a byte for a token and key). Two figures: the peak of MLX's allocator over what it held before, and that of the
process's resident memory, in which the kernels' own scratch memory counts too. Each reading has a process of its own,
so that nothing is left of an earlier one.

kernels   on the CPU kernels, in both precisions
plain     attention in MLX's own operations, as on a GPU or with EDGER1_KERNELS=0, but its products run on the
          kernels' functions
without   the same with EDGER1_KERNELS=0: on MLX's own products, twenty minutes on a CPU
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import bench
from benchmarks.bench import PRECISIONS, Bench, side
from benchmarks.common import Comparison, Side

TOKENS, SHORT, LONG = 512, 4096, 16384
QUICK_TOKENS, QUICK_SHORT, QUICK_LONG = 24, 256, 512
BAR_MB, GROWTH_BAR = 400.0, 1.05
METRICS = {"MLX's": "mlx_mb", "resident": "resident_mb"}
RANK, ROPE, HIDDEN = 512, 64, 7168
ROUNDS = {"kernels": 2, "plain": 1, "without": 1}
"""Readings differ by what the system hands out at a time; more say nothing more."""


class Prefill:
    """A chunk of a prompt through the layer's attention over a cache of random latents: extra megabytes at the peak."""

    def __init__(self, precision: str, plain: bool) -> None:
        from edger1.kernels import latent
        from edger1.kernels.install import install
        from edger1.mlx_runtime import prepare

        prepare()
        from benchmarks.sides_blocks import MLA
        from benchmarks.sides_blocks import layer as one_layer

        layer = one_layer(MLA, None if plain else precision)
        if plain:
            install(layer, "exact", fuse=False)
            if latent.install(layer, precision, None).plain != 1:
                raise RuntimeError("attention over latents is not in place")
        self._attention = layer.self_attn

    def __call__(self, tokens: int, cached: int) -> dict[str, float]:
        import mlx.core as mx
        from mlx_lm.models.base import create_attention_mask
        from mlx_lm.models.cache import KVCache

        from benchmarks.cgroup import resident_of

        cache = KVCache()
        mx.eval(cache.update_and_fetch(*(mx.random.normal((1, 1, cached, size)) for size in (RANK, ROPE))))
        x = mx.random.normal((1, tokens, HIDDEN))
        mask = create_attention_mask(x, cache, return_array=True)
        mx.eval(x, mask)
        mx.clear_cache()
        # Lets the kernel count the largest resident set from here on.
        Path("/proc/self/clear_refs").write_text("5")
        held, resident = mx.get_active_memory(), resident_of().rss
        mx.reset_peak_memory()
        mx.eval(self._attention(x, mask, cache), cache.keys, cache.values)
        return {
            "mlx_mb": (mx.get_peak_memory() - held) / 1e6,
            "resident_mb": (resident_of().peak - resident) / 1e6,
        }


def prefill(precision: str, plain: bool = False) -> Prefill:
    """Set up the layer."""
    return Prefill(precision, plain)


def _readings(run: Bench, part: str, cached: int, **arguments: Any) -> list[dict[str, float]]:
    """Take each reading in a process of its own."""
    found = []
    for _ in range(min(run.rounds, ROUNDS[part])):
        worker = run.worker(
            "latent_memory:prefill", arguments, **({"EDGER1_KERNELS": "0"} if part == "without" else {})
        )
        found.append(worker.measure(tokens=_sizes(run)[0], cached=cached))
        print(f"  {arguments}, after {cached}: {found[-1]}", flush=True)
        worker.close()
    return found


def _compared(name: str, short: list[dict[str, float]], long: list[dict[str, float]], run: Bench) -> list[Comparison]:
    tokens, few, many = _sizes(run)
    made = []
    for what, metric in METRICS.items():
        after_many = side("EdgeR1", name, long, metric, "MB")
        made += [
            Comparison(
                f"{what} extra memory, {tokens} tokens after {many}, {name} / the bar",
                after_many,
                Side("the bar", "", "MB", (BAR_MB,)),
                1.0,
                less_is_better=True,
                form="share",
            ),
            Comparison(
                f"{what} extra memory, {tokens} tokens after {many}, {name} / after {few}",
                after_many,
                side("EdgeR1", f"{name}, after {few}", short, metric, "MB"),
                GROWTH_BAR,
                less_is_better=True,
                form="share",
            ),
        ]
    return made


def _sizes(run: Bench) -> tuple[int, int, int]:
    return (QUICK_TOKENS, QUICK_SHORT, QUICK_LONG) if run.quick else (TOKENS, SHORT, LONG)


def kernels(run: Bench) -> list[Comparison]:
    """On the CPU kernels."""
    _, few, many = _sizes(run)
    made: list[Comparison] = []
    for precision in PRECISIONS:
        short, long = (_readings(run, "kernels", cached, precision=precision) for cached in (few, many))
        made += _compared(precision, short, long, run)
    return made


def plain(run: Bench, part: str = "plain", name: str = "MLX's own operations") -> list[Comparison]:
    """In MLX's own operations."""
    _, few, many = _sizes(run)
    short, long = (_readings(run, part, cached, precision="exact", plain=True) for cached in (few, many))
    return _compared(name, short, long, run)


def without(run: Bench) -> list[Comparison]:
    """Without the kernels."""
    return plain(run, "without", "without kernels")


if __name__ == "__main__":
    raise SystemExit(bench.main("latent_memory", __doc__, {"kernels": kernels, "plain": plain, "without": without}))
