"""Training from nothing: EdgeR1 against mlx-lm's modules and MLX's AdamW as shipped, on the recipes' two models.

    python -m benchmarks.pretrain                 # both models, five rounds
    python -m benchmarks.pretrain --only moe      # one of moe, dense

A reading is one whole step: forward, backward, clipping and the optimizer. EdgeR1's ("fast" is mixed precision) takes
64 rows of 256 tokens, with Muon and the MTP layer; MLX's 2 rows with AdamW and without MTP.
"""

from __future__ import annotations

from functools import partial

from benchmarks import bench
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Measure

LENGTH, ROWS, PEER_ROWS = 256, 64, 2
BAR = 10.0
PEER_ROUNDS = 3


def trained(model: str, run: Bench) -> list[Comparison]:
    """Tokens a second of whole steps."""
    rows, peer_rows = (2, 1) if run.quick else (ROWS, PEER_ROWS)
    function, arguments = "sides_train:pretrain", {"model": model}
    ours = run.ours(function, arguments)
    shipped, settings = run.shipped(function, arguments, {"rows": 1, "tokens": 64})
    measures: dict[str, Measure] = {p: partial(w.measure, rows=rows, tokens=LENGTH) for p, w in ours.items()}
    measures["MLX"] = partial(shipped.measure, rows=peer_rows, tokens=LENGTH)
    readings = run.interleave(measures, fewer={"MLX": PEER_ROUNDS})
    peer = side("MLX as shipped", f"{settings}, AdamW, {peer_rows} rows", readings["MLX"])
    return [
        Comparison(
            f"a training step of nano-{model}, {precision} / MLX as shipped",
            side("EdgeR1", f"{precision}, Muon, {rows} rows of {LENGTH}", readings[precision]),
            peer,
            BAR,
        )
        for precision in ours
    ]


PARTS = {"moe": partial(trained, "moe"), "dense": partial(trained, "dense")}

if __name__ == "__main__":
    raise SystemExit(bench.main("pretrain", __doc__, PARTS))
