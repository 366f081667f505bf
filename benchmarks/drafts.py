"""Decoding with drafts against decoding without, the same answers; and whether drafts change what is drawn.

    python -m benchmarks.drafts                       # all parts, ten minutes
    python -m benchmarks.drafts --only mtp
    python -m benchmarks.drafts --only statistics-mtp-0.6    # chi-square of 100,000 draws; 1.0, 1.5; lookup, draft

Both sides are EdgeR1, greedy, in a process each, and answer the same questions in turns; a part fails where one word
differs.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import peers
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Side
from edger1.messages import Sampling

MTP_BAR, STREAMED_BAR, LOOKUP_BAR = 1.3, 1.0, 1.5
SIGNIFICANCE = 0.001
TEMPERATURES = (0.6, 1.0, 1.5)
DRAWS = 100_000
TOKENS = {"questions": 200, "quoting": 120}


def _compared(
    run: Bench, what: str, bar: float | None, sources: tuple[str, ...], prompts: str, **arguments: Any
) -> list[Comparison]:
    """Compare each of `sources` with plain decoding on one list of prompts; the first is held against the bar."""
    sides = {
        name: run.worker("sides_drafts:answers", {**arguments, "speculate": name, "prompts": prompts})
        for name in ("off", *sources)
    }
    tokens = TOKENS[prompts] // (4 if run.quick else 1)
    readings = run.interleave({name: partial(worker.measure, tokens=tokens) for name, worker in sides.items()})
    said = {reading["text"] for taken in readings.values() for reading in taken}
    if len(said) > 1:
        raise RuntimeError(f"{what}: answers with drafts differ from those without")
    peer = side("EdgeR1", "plain", readings["off"])
    lines = []
    for name in sources:
        last = readings[name][-1]
        run.notes.append(
            f"{what}, {name}: {last['drafted']:.2f} drafts a token, {last['accepted']:.0%} of them stood"
            + (
                f"; {last['bytes']:,.0f} bytes read a token, plain {readings['off'][-1]['bytes']:,.0f}"
                if last["bytes"]
                else ""
            )
        )
        ours = side("EdgeR1", name, readings[name])
        lines.append(Comparison(f"{what}, {name} / plain", ours, peer, bar if name == sources[0] else None))
    return lines


def mtp(run: Bench) -> list[Comparison]:
    """nano-moe's MTP layer."""
    return _compared(run, "decode, nano-moe", MTP_BAR, ("mtp", "auto"), "questions", model="nano-moe")


def streamed(run: Bench) -> list[Comparison]:
    """The same with a quarter of the experts in slots, the MTP layer's among them."""
    what = "decode, nano-moe, 25% of the experts"
    return _compared(run, what, STREAMED_BAR, ("mtp", "auto"), "questions", model="nano-moe", slots="25%")


def draft(run: Bench) -> list[Comparison]:
    """nano-dense drafts for nano-moe, which computes as much a token: drafts should end by themselves."""
    return _compared(run, "decode, nano-moe by nano-dense", None, ("draft",), "questions", model="nano-moe", draft=True)


def lookup(run: Bench) -> list[Comparison]:
    """SmolLM2-135M sums a text up and quotes it."""
    what = "decode, SmolLM2-135M, summing up and quoting"
    return _compared(run, what, LOOKUP_BAR, ("lookup",), "quoting", model=str(peers.smollm2_folder()))


def unhelped(run: Bench) -> list[Comparison]:
    """SmolLM2-135M answers questions that leave nothing to look up: what drafting costs where it does not help."""
    what = "decode, SmolLM2-135M, nothing to quote"
    return _compared(run, what, None, ("auto",), "questions", model=str(peers.smollm2_folder()))


def statistics(run: Bench, source: str, temperature: float) -> list[Comparison]:
    """Chi-square of what is drawn with drafts of one source against the model's own distribution."""
    from benchmarks import drafts_statistics

    draws = 2000 if run.quick else DRAWS
    with drafts_statistics.kernels():
        live, table = drafts_statistics.model()
        found = drafts_statistics.compare(live, table, source, Sampling(temperature=temperature), draws, 1)
    run.notes.append(
        f"{source} at {temperature}: chi-square {found.statistic:.1f}, {found.freedom} degrees of freedom, "
        f"{found.draws:,} draws, {found.accepted:.0%} of the drafts stood"
    )
    ours, level = Side("EdgeR1", source, "", (found.p,)), Side("level", "", "", (SIGNIFICANCE,))
    return [Comparison(f"p of {source} at temperature {temperature} / level of rejection", ours, level, 1.0)]


PARTS = {
    "mtp": mtp,
    "streamed": streamed,
    "lookup": lookup,
    "unhelped": unhelped,
    "draft": draft,
    **{
        f"statistics-{source}-{temperature}": partial(statistics, source=source, temperature=temperature)
        for source in ("lookup", "draft", "mtp")
        for temperature in TEMPERATURES
    },
}


def main() -> int:
    """Measure."""
    from benchmarks import bench

    return bench.main("drafts", __doc__, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
