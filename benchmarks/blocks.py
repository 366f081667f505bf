"""Whole blocks of large models, with random weights: EdgeR1 against mlx-lm as shipped.

    python -m benchmarks.blocks                 # everything, five rounds
    python -m benchmarks.blocks --only moe      # one part: moe, mla
    python -m benchmarks.blocks --quick         # one short round, to see that all of it runs

moe    one token through the MoE layer of OLMoE-1B-7B: router, 8 of 64 experts of 2048 x 1024 at 4 bits, weighted sum
mla    DeepSeek-V3's attention at 4 bits (128 heads, latent of 512, rope 64, nope and value 128) over 4,096 cached
       tokens: four tokens at a time against one, and against mlx-lm, which takes many seconds for four and therefore
       gets three readings
"""

from __future__ import annotations

from functools import partial

from benchmarks import bench
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Measure
from benchmarks.kernels import against_shipped

MOE_BAR = 30.0
MLA_TOKENS, MLA_CACHED = 4, 4096
MLA_SHARE_BAR, MLA_BAR = 1.5, 50.0
MLA_PEER_ROUNDS = 3


def moe(run: Bench) -> list[Comparison]:
    """One token through one MoE layer."""
    request = {"repeats": 5 if run.quick else 100}
    return against_shipped(
        run, "sides_blocks:moe", {}, "MoE layer, 64 experts, 2048x1024, top-8, one token", MOE_BAR, request
    )


def mla(run: Bench) -> list[Comparison]:
    """Latent attention of several tokens at once."""
    cached = 256 if run.quick else MLA_CACHED
    ours = run.ours("sides_blocks:mla", {})
    # The probe is one token: four take mlx-lm too long to find out which of two settings is faster.
    shipped, settings = run.shipped("sides_blocks:mla", {}, {"tokens": 1, "cached": cached})
    measures: dict[str, Measure] = {
        f"{precision} {tokens}": partial(worker.measure, tokens=tokens, cached=cached, repeats=5)
        for precision, worker in ours.items()
        for tokens in (1, MLA_TOKENS)
    }
    measures["MLX"] = partial(shipped.measure, tokens=MLA_TOKENS, cached=cached, warm=False)
    readings = run.interleave(measures, fewer={"MLX": MLA_PEER_ROUNDS})
    if len(readings["MLX"]) < run.rounds:
        settings += f", {len(readings['MLX'])} readings"
    found: list[Comparison] = []
    for precision in ours:
        several = side("EdgeR1", precision, readings[f"{precision} {MLA_TOKENS}"], "ms", "ms")
        found += [
            Comparison(
                f"MLA over {cached} tokens, L={MLA_TOKENS} / L=1, {precision}",
                several,
                side("EdgeR1", f"{precision}, L=1", readings[f"{precision} 1"], "ms", "ms"),
                MLA_SHARE_BAR,
                less_is_better=True,
                form="share",
            ),
            Comparison(
                f"MLA over {cached} tokens, L={MLA_TOKENS}, {precision} / MLX as shipped",
                several,
                side("MLX as shipped", settings, readings["MLX"], "ms", "ms"),
                MLA_BAR,
                less_is_better=True,
            ),
        ]
    return found


if __name__ == "__main__":
    raise SystemExit(bench.main("blocks", __doc__, {"moe": moe, "mla": mla}))
