"""Which experts stay in memory: eviction policies on recorded routing of nano-moe, beside LRU and the best possible.

    python -m benchmarks.policy                     # replay the kept trace (a minute), then what a decision costs
    python -m benchmarks.policy --only hits
    python -m benchmarks.policy --record            # record the trace anew, after the model was trained further
    python -m benchmarks.policy --record FOLDER     # of other weights

Every other session of the trace was used to choose the policies' constants; figures are of the others, one after the
other through banks that start empty. The bound is Belady's, with the future known (`edger1.experts.replay`).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import bench, routing
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Side
from edger1.experts import replay, trace
from edger1.experts.policy import DEFAULT_POLICY, LRU, POLICIES, Policy
from edger1.train import plot

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)
AVERAGED = (0.25, 0.5)
BAR = 0.25
BOUND = "bound"

COST_SHAPE = 128, 8, 64  # experts, top_k, slots: Qwen3-30B-A3B with half of its experts in memory
COST_LIMIT_US = 10.0
COST_STEPS = 4000

Rates = dict[str, list[float]]
"""Policy (or `BOUND`) -> its hit rate at each of SHARES."""


def hit_rates(reported: trace.Trace, makers: dict[str, Callable[[int], Policy]], before: trace.Trace | None) -> Rates:
    """Return hit rates over all layers; with `before`, of banks and policies that start from its counts."""
    layers = range(reported.chosen.shape[1])
    steps = [reported.chosen[:, layer].tolist() for layer in layers]
    scores = [reported.scores(layer) for layer in layers]
    asked = reported.chosen.size
    rates: Rates = {}
    for name, make in makers.items():
        rates[name] = []
        for share in SHARES:
            slots, missed = round(share * reported.experts), 0
            for layer in layers:
                policy, resident = make(reported.experts), []
                if before is not None:
                    counts = before.counts(layer)
                    policy.warm(counts.tolist())
                    resident = np.argsort(-counts, kind="stable")[:slots].tolist()
                missed += replay.misses(policy, steps[layer], slots, scores[layer], resident)
            rates[name].append(1 - missed / asked)
        _tell(name, rates[name])
    if before is None:
        bounds = [[replay.fewest_misses(s, round(share * reported.experts)) for s in steps] for share in SHARES]
        rates[BOUND] = [1 - sum(missed) / asked for missed in bounds]
        _tell(BOUND, rates[BOUND])
    return rates


def _tell(name: str, rates: list[float]) -> None:
    print(f"  {name:10}" + "".join(f"{rate:8.1%}" for rate in rates), file=sys.stderr, flush=True)


def closed(rates: Rates, name: str) -> list[float]:
    """Return the share of the gap between LRU and the bound that a policy closes, at each of SHARES."""
    lru, best = np.array(rates["lru"]), np.array(rates[BOUND])
    return list((np.array(rates[name]) - lru) / (best - lru))


def hits(run: Bench) -> list[Comparison]:
    """Hit rates of all policies on the sessions that nothing was tuned on."""
    whole = trace.load(routing.TRACE)
    tuning, reported = routing.tuning_and_reported(whole)
    if run.quick:
        tuning, reported = tuning.part(slice(1)), reported.part(slice(1))
    rates = hit_rates(reported, POLICIES, None)
    warm = hit_rates(reported, {name: POLICIES[name] for name in ("lru", DEFAULT_POLICY)}, tuning)
    run.notes += [
        f"{len(reported.chosen)} tokens of {len(reported.sessions)} sessions of {whole.about['model']}: "
        f"{whole.chosen.shape[1]} layers, {whole.about['top_k']} of {whole.experts} experts. Constants were chosen on "
        f"{len(tuning.chosen)} tokens of {len(tuning.sessions)} others. The token before used "
        f"{routing.share_of_repeats(reported):.0%} of a token's experts.",
        table(rates, warm),
    ]
    if not run.quick:
        run.results.mkdir(parents=True, exist_ok=True)
        (run.results / "policy.svg").write_text(drawn(rates), "utf-8")
    # What LRU leaves to gain is the peer's side, so that the figure is the share of it that was gained.
    lines = [
        Comparison(
            f"gap between LRU and the bound, {share:.1%} of experts in slots",
            Side(f"EdgeR1 {DEFAULT_POLICY}", "", "points of hit rate", (100 * (ours - lru),)),
            Side("Belady, future known", "", "points of hit rate", (100 * (best - lru),)),
        )
        for share, ours, lru, best in zip(SHARES, rates[DEFAULT_POLICY], rates["lru"], rates[BOUND], strict=True)
    ]
    mean = np.mean([closed(rates, DEFAULT_POLICY)[SHARES.index(share)] for share in AVERAGED])
    at = " and ".join(f"{share:.0%}" for share in AVERAGED)
    lines.append(
        Comparison(
            f"share of that gap closed, mean of {at}",
            Side(f"EdgeR1 {DEFAULT_POLICY}", "", "of the gap", (float(mean),)),
            Side("Belady, future known", "", "of the gap", (1.0,)),
            BAR,
        )
    )
    return lines


def table(rates: Rates, warm: Rates) -> str:
    """Return all hit rates, and the shares of the gap in brackets, as Markdown."""
    lines = ["| experts in slots | " + " | ".join(f"{share:.1%}" for share in SHARES) + " |", "|---" * 6 + "|"]
    for name, values in rates.items():
        shares = closed(rates, name)
        cells = (
            f"{v:.1%}" + ("" if name in ("lru", BOUND) else f" ({s:+.0%})") for v, s in zip(values, shares, strict=True)
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, values in warm.items():
        lines.append(f"| {name}, warm start | " + " | ".join(f"{value:.1%}" for value in values) + " |")
    return "\n".join(lines)


def drawn(rates: Rates) -> str:
    """Return hit rates over slots as SVG."""
    x = [100 * share for share in SHARES]
    series = [plot.Line(name, x, [100 * rate for rate in values]) for name, values in rates.items()]
    return plot.lines("Hit rate by eviction policy, nano-moe", "experts in slots, %", "hit rate, %", series)


def cost(run: Bench) -> list[Comparison]:
    """Microseconds of `use` and one `victim`, learning included, on random routing in Qwen3-30B-A3B's shape."""
    experts, top_k, slots = COST_SHAPE
    rng = np.random.default_rng(0)
    steps = [rng.choice(experts, top_k, replace=False).tolist() for _ in range(COST_STEPS // (4 if run.quick else 1))]
    makers: dict[str, Callable[[int], Policy]] = {DEFAULT_POLICY: POLICIES[DEFAULT_POLICY], "lru": LRU}
    readings = run.interleave({name: partial(_cost, make, experts, slots, steps) for name, make in makers.items()})
    ours = side(f"EdgeR1 {DEFAULT_POLICY}", "", readings[DEFAULT_POLICY], "us", "us")
    what = f"use and victim, {experts} experts, {top_k} a step"
    return [
        Comparison(f"{what} / limit", ours, Side("limit", "", "us", (COST_LIMIT_US,)), 1.0, True, "share"),
        Comparison(f"{what} / LRU", ours, side("LRU", "", readings["lru"], "us", "us"), None, True, "share"),
    ]


def _cost(make: Callable[[int], Policy], experts: int, slots: int, steps: list[list[int]]) -> dict[str, float]:
    policy, held, spent = make(experts), set(range(slots)), 0
    clock = time.perf_counter_ns
    for step in steps:
        needed = set(step)
        began = clock()
        policy.use(step)
        victim = policy.victim(held, needed)
        spent += clock() - began
        missing = next((expert for expert in step if expert not in held), None)
        if victim is not None and missing is not None:
            held.remove(victim)
            held.add(missing)
    return {"us": spent / len(steps) / 1e3}


PARTS = {"hits": hits, "cost": cost}


def main() -> int:
    """Record, or measure."""
    if "--record" in sys.argv[1:]:
        parser = argparse.ArgumentParser(description="Record the routing of nano-moe.")
        parser.add_argument("--record", type=Path, nargs="?", const=routing.WEIGHTS, metavar="FOLDER")
        routing.record(parser.parse_args().record, routing.TRACE)
        return 0
    return bench.main("policy", __doc__, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
