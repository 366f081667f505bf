"""Experts streamed from disk under a memory limit: EdgeR1 against nunspark, llama.cpp, its own promises and itself.

    python -m benchmarks.streaming                         # all parts
    python -m benchmarks.streaming --only cold25-llama

The model has Qwen3-30B-A3B's widths and 24 layers, or OLMoE 1B-7B's in the parts of that name, with random weights and
routing as skewed as a trained model's (`benchmarks.random_moe`); all sides recite the same text. Every side runs inside
a cgroup of its own without swap, of a share of the model's size, from its first read. Cold: caches dropped, a new
process, the first answer. Warm: another answer after a first one inside the cgroup.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks import bench, peers, peers_streaming, sides_streaming
from benchmarks.bench import Bench, side
from benchmarks.cgroup import Limited, LimitUnavailableError, drop_caches
from benchmarks.common import Comparison, Measure, Side, child_environment
from benchmarks.peers import LlamaSettings, PeerMissingError
from benchmarks.streaming_setup import (
    CONTEXTS,
    GENERATE,
    PRECISION,
    Reading,
    Subject,
    Turns,
    asked,
    asked_llama,
    asked_nunspark,
    current,
    edger1,
    label,
    measured,
    new,
    nunspark,
    packed,
    read_ahead_kb,
    share,
    subject,
)
from benchmarks.worker import Side as Worker
from benchmarks.worker import SideUnavailableError

AMPLE_BYTES = 15 << 30
"""A limit under which every side holds the whole model."""
SLOW_ROUNDS = 3
"""Readings of a side that takes minutes for one."""
SHORT = 8
"""Tokens to generate where a side takes seconds for each."""
NUNSPARK_OVERHEAD_BYTES = 1_100_000_000
"""What nunspark takes beyond its budget with this shape: embedding, head, a layer's experts twice, Python.

Found by trying: with 1.0 GB it survived a quarter and half of the model's size with 0.1 GB to spare. How large its
budget is hardly matters, since it computes for two seconds a token.
"""
BIG_LIMIT_BYTES = 8_000_000_000


def _llama_settings(run: Bench, limit_bytes: int, *, ample: bool) -> LlamaSettings:
    """Return the fastest settings under a limit; repacking copies the model, so it is tried only where that fits."""
    candidates = [s for s in peers.all_settings() if ample or not s.repack]
    rates: dict[LlamaSettings, float] = {}
    task = subject().task(4)
    with Limited(limit_bytes) as group:
        for settings in candidates:
            try:
                rates[settings] = asked_llama(run, settings, task, group)["rate"]
            except PeerMissingError as error:
                print(f"!!! {error}", file=sys.stderr)
                continue
            print(f"  llama.cpp, {settings}: {rates[settings]:.2f} tok/s", file=sys.stderr, flush=True)
            if not ample:
                # What is not compute is reading, which none of them changes.
                break
    if not rates:
        raise PeerMissingError(f"llama.cpp ran with no settings under {limit_bytes / 1e9:.2f} GB")
    return max(rates, key=lambda settings: rates[settings])


def _against(
    run: Bench,
    what: str,
    peer: str,
    settings: str,
    readings: Mapping[str, list[Reading]],
    bar: float,
    limit: int,
    generate: int = GENERATE,
) -> list[Comparison]:
    """Compare the decode rates, and note what belongs to them."""
    what = label(what)
    for name, taken in readings.items():
        if not all(reading["recited"] for reading in taken):
            run.skip(f"part of {name}", "it did not recite the text, and so did not use the same experts")
        hits = [reading["hit_rate"] for reading in taken if "hit_rate" in reading]
        if hits:
            run.notes.append(f"{what}: {name} found {statistics.median(hits):.0%} of the experts in memory")
    run.notes.append(
        f"{what}: {generate} tokens after a prompt of 8, limit {limit / 1e9:.2f} GB for each side; the disk reads "
        f"{read_ahead_kb(peers.cache())} KB ahead"
    )
    few = len(readings[peer])
    if few < run.rounds:
        run.notes.append(f"{what}: {few} readings of {peer}, which takes long")
    return [
        Comparison(
            f"decode, {what} / {peer}",
            side("EdgeR1", PRECISION, readings["EdgeR1"]),
            side(peer, settings, readings[peer]),
            bar,
        )
    ]


def slots100_llama(run: Bench) -> list[Comparison]:
    """All experts in slots; llama.cpp with the whole model in memory."""
    settings = _llama_settings(run, AMPLE_BYTES, ample=True)
    ours = run.enter(edger1(run, new(run, AMPLE_BYTES), memory=AMPLE_BYTES, expert_slots="100%"))
    asked(ours, subject().task())
    group, turns = new(run, AMPLE_BYTES), Turns()

    def llama() -> Reading:
        task = turns.next("llama.cpp")
        if not settings.repack:
            # What it maps must be in memory; repacked weights always are.
            asked_llama(run, settings, task, group)
        return asked_llama(run, settings, task, group)

    readings = run.interleave({"EdgeR1": lambda: asked(ours, turns.next("EdgeR1")), "llama.cpp": llama})
    return _against(run, "experts 100% in slots", "llama.cpp", f"Q4_0, {settings}", readings, 1.1, AMPLE_BYTES)


def slots100_nunspark(run: Bench) -> list[Comparison]:
    """All experts in slots; nunspark with a budget above the model, answering what it has just answered."""
    ours = run.enter(edger1(run, new(run, AMPLE_BYTES), memory=AMPLE_BYTES, expert_slots="100%"))
    asked(ours, subject().task())
    settings = peers_streaming.nunspark_settings(packed(), AMPLE_BYTES - (2 << 30))
    peer = run.enter(nunspark(run, new(run, AMPLE_BYTES), settings))
    turns = Turns(SHORT)

    def nunspark_again() -> Reading:
        task = turns.next("nunspark")
        # It fills its cache with what is asked for: the second time all of it is there.
        asked_nunspark(peer, task)
        return asked_nunspark(peer, task)

    measures: dict[str, Measure] = {"EdgeR1": lambda: asked(ours, turns.next("EdgeR1")), "nunspark": nunspark_again}
    readings = run.interleave(measures, fewer={"nunspark": min(run.rounds, SLOW_ROUNDS)})
    return _against(run, "experts 100% in slots", "nunspark", str(settings), readings, 5, AMPLE_BYTES, SHORT)


def warm50_llama(run: Bench) -> list[Comparison]:
    """Half of the model's size, after a first answer inside the cgroup."""
    limit = share(50)
    drop_caches()
    settings = _llama_settings(run, limit, ample=False)
    ours = run.enter(edger1(run, new(run, limit), memory=limit))
    group, turns, first = new(run, limit), Turns(SHORT), subject().task(SHORT)
    asked(ours, first)
    asked_llama(run, settings, first, group)
    measures: dict[str, Measure] = {
        "EdgeR1": lambda: asked(ours, turns.next("EdgeR1")),
        "llama.cpp": lambda: asked_llama(run, settings, turns.next("llama.cpp"), group),
    }
    readings = run.interleave(measures, fewer={"llama.cpp": min(run.rounds, SLOW_ROUNDS)})
    return _against(run, "50% warm", "llama.cpp", f"Q4_0, mmap, {settings}", readings, 1.5, limit, SHORT)


def warm50_nunspark(run: Bench) -> list[Comparison]:
    """Half of the model's size, after a first answer inside the cgroup."""
    limit = share(50)
    drop_caches()
    ours = run.enter(edger1(run, new(run, limit), memory=limit))
    settings = peers_streaming.nunspark_settings(packed(), limit - NUNSPARK_OVERHEAD_BYTES)
    peer = run.enter(nunspark(run, new(run, limit), settings))
    turns, first = Turns(SHORT), subject().task(SHORT)
    asked(ours, first)
    asked_nunspark(peer, first)
    measures: dict[str, Measure] = {
        "EdgeR1": lambda: asked(ours, turns.next("EdgeR1")),
        "nunspark": lambda: asked_nunspark(peer, turns.next("nunspark")),
    }
    readings = run.interleave(measures, fewer={"nunspark": min(run.rounds, SLOW_ROUNDS)})
    return _against(run, "50% warm", "nunspark", str(settings), readings, 5, limit, SHORT)


def _cold(run: Bench, turns: Turns, limit: int, known: Path | None = None) -> Reading:
    drop_caches()
    with Limited(limit) as group, edger1(run, group, known, memory=limit) as ours:
        return asked(ours, turns.next("EdgeR1" if known is None else "EdgeR1, popularity known"))


def cold25_llama(run: Bench) -> list[Comparison]:
    """A quarter of the model's size, the first answer of a new process with caches dropped.

    Once more with what EdgeR1 has learnt of the experts' popularity from answers before, of other texts.
    """
    limit, turns = share(25), Turns(SHORT)
    settings = peers_streaming.mapped(peers.all_settings()[0])
    known = sides_streaming.fresh(subject().folder, Path(run.enter(tempfile.TemporaryDirectory())))
    with Limited(limit) as group, edger1(run, group, known, memory=limit) as learning:
        for _ in range(1 if run.quick else 4):
            asked(learning, subject().task(64))

    def llama() -> Reading:
        drop_caches()
        with Limited(limit) as group:
            return asked_llama(run, settings, turns.next("llama.cpp"), group)

    readings = run.interleave(
        {
            "EdgeR1": partial(_cold, run, turns, limit),
            "llama.cpp": llama,
            "EdgeR1, popularity known": partial(_cold, run, turns, limit, known),
        },
        fewer={"llama.cpp": min(run.rounds, SLOW_ROUNDS)},
    )
    said = f"Q4_0, mmap, {settings}"
    made = _against(run, "25% cold", "llama.cpp", said, readings, 2, limit, SHORT)
    later = side("EdgeR1", f"{PRECISION}, popularity known", readings["EdgeR1, popularity known"])
    name = f"decode, {label('25% cold, not the first run')} / llama.cpp"
    return [*made, Comparison(name, later, made[0].peer)]


def cold25_nunspark(run: Bench) -> list[Comparison]:
    """A quarter of the model's size, the first answer of a new process with caches dropped."""
    limit, turns = share(25), Turns(SHORT)
    settings = peers_streaming.nunspark_settings(packed(), limit - NUNSPARK_OVERHEAD_BYTES)

    def peer() -> Reading:
        drop_caches()
        with Limited(limit) as group, nunspark(run, group, settings) as worker:
            return asked_nunspark(worker, turns.next("nunspark"))

    measures: dict[str, Measure] = {"EdgeR1": partial(_cold, run, turns, limit), "nunspark": peer}
    readings = run.interleave(measures, fewer={"nunspark": min(run.rounds, SLOW_ROUNDS)})
    return _against(run, "25% cold", "nunspark", str(settings), readings, 2, limit, SHORT)


def _under_limit(run: Bench, name: str | None, limit: int, words: int, generate: int) -> Reading:
    """Load cold under a limit and answer a long prompt, for which the context is just large enough, and a short one.

    Returns rates and peaks.
    """
    drop_caches()
    tasks = subject(name).task(generate, words), subject(name).task(generate)
    given = {"memory": limit, "context": words + generate + 2}
    with Limited(limit) as group, edger1(run, group, of=name, **given) as ours:
        try:
            first, second = (asked(ours, task) for task in tasks)
        except SideUnavailableError as error:
            kills = group.taken().oom_kills
            raise SideUnavailableError(f"{error}; killed {kills} times for want of memory") from error
        taken = group.taken()
    if taken.oom_kills:
        raise SideUnavailableError(f"{taken.oom_kills} processes were killed for want of memory")
    planned, peak = second["planned_bytes"], second["peak_bytes"]
    accounted, resident = second["accounted_bytes"], second["resident_bytes"]
    return {
        "cold": first["rate"],
        "rate": second["rate"],
        "hit_rate": second.get("hit_rate", 1.0),
        "recited": first["recited"] * second["recited"],
        "group_bytes": float(taken.peak_bytes),
        "peak_bytes": peak,
        "off": max(accounted / resident, resident / accounted),
        "planned": planned / peak,
    }


def _peaks(what: str, limit: int, readings: list[Reading]) -> list[Comparison]:
    bound = Side("the limit", "", "GB", (limit / 1e9,))
    rows = [
        ("cgroup's peak", "group_bytes", bound, 1.0),
        ("peak of RSS and mapped", "peak_bytes", bound, 1.0),
    ]
    made = [
        Comparison(
            f"{peak}, {what} / limit",
            side("EdgeR1", PRECISION, readings, metric, "GB", 1e9),
            peer,
            bar,
            less_is_better=True,
            form="share",
        )
        for peak, metric, peer, bar in rows
    ]
    exact = Side("RSS and mapped", "", "x", (1.0,))
    off = side("EdgeR1's account", "the larger over the smaller", readings, "off", "x")
    made.append(
        Comparison(f"account against RSS and mapped, {what}", off, exact, 1.05, less_is_better=True, form="share")
    )
    plan = side("EdgeR1's plan", "for a full context", readings, "planned", "x")
    made.append(Comparison(f"plan / peak of RSS and mapped, {what}", plan, exact, form="share"))
    return made


def ceiling(run: Bench) -> list[Comparison]:
    """Peaks under a quarter and half of the model's size, with a prompt of 512 tokens and one of 8."""
    made: list[Comparison] = []
    words, generate = (64, 8) if run.quick else (512, 32)
    for percent in (25, 50):
        limit = share(percent)
        taken = run.interleave({"EdgeR1": partial(_under_limit, run, None, limit, words, generate)})["EdgeR1"]
        made += _peaks(label(f"{percent}%"), limit, taken)
    return made


def big(run: Bench) -> list[Comparison]:
    """All 48 layers, 17 GB, in a cgroup of 8 GB: EdgeR1 alone."""
    limit = BIG_LIMIT_BYTES
    rounds = run.interleave({"EdgeR1": partial(_under_limit, run, "qwen3-48", limit, 64, 32)})["EdgeR1"]
    hits = statistics.median(reading["hit_rate"] for reading in rounds)
    run.notes.append(f"{subject('qwen3-48').nbytes / 1e9:.1f} GB of weights; warm, {hits:.0%} of the experts in memory")
    warm = side("EdgeR1", f"{PRECISION}, second answer", rounds)
    cold = side("EdgeR1", f"{PRECISION}, first answer, cold", rounds, "cold")
    return [*_peaks("17 GB in 8 GB", limit, rounds), Comparison("decode, 17 GB in 8 GB, warm / cold", warm, cold)]


def resident(run: Bench) -> list[Comparison]:
    """All experts in slots against the same model without streaming; a process for each reading."""
    first, turns = subject().task(), Turns(64)

    def once(name: str, **arguments: Any) -> Reading:
        with Limited(AMPLE_BYTES) as group, edger1(run, group, memory=AMPLE_BYTES, **arguments) as worker:
            asked(worker, first)
            return asked(worker, turns.next(name))

    readings = run.interleave(
        {
            "in slots": partial(once, "in slots", expert_slots="100%"),
            "resident": partial(once, "resident"),
        }
    )
    ours = side("EdgeR1", f"{PRECISION}, 100% in slots", readings["in slots"])
    peer = side("EdgeR1", f"{PRECISION}, resident", readings["resident"])
    return [Comparison(f"decode, {label('all experts in slots')} / resident", ours, peer, 0.95)]


def prefill(run: Bench) -> list[Comparison]:
    """Bytes that the prefill of 512 tokens reads, cold under a quarter of the model's size, by both counts.

    OLMoE's quarter leaves room for steps of fewer tokens only, each of which reads its experts: there half as well.
    """
    made: list[Comparison] = []
    for percent in (25, 50) if current() in CONTEXTS else (25,):
        what = label("bytes read for a prefill of 512" + (f" at {percent}%" if percent != 25 else ""))
        taken = run.interleave({"EdgeR1": partial(_prefilled, run, share(percent))})["EdgeR1"]
        distinct = side("distinct experts used", "", taken, "distinct_bytes", "GB", 1e9)
        made += [
            Comparison(
                f"{what}, {count} / distinct experts'",
                side("EdgeR1", count, taken, metric, "GB", 1e9),
                distinct,
                bar,
                less_is_better=True,
                form="share",
            )
            for count, metric, bar in (("own count", "prefill_bytes", 1.02), ("kernel's count", "disk_bytes", None))
        ]
    return made


def _prefilled(run: Bench, limit: int) -> Reading:
    drop_caches()
    with Limited(limit) as group, edger1(run, group, memory=limit) as ours:
        return _streamed(asked(ours, subject().task(0, 512)))


def _streamed(reading: Reading) -> Reading:
    if "distinct_bytes" not in reading:
        raise SideUnavailableError("EdgeR1 held the whole model in memory, and streamed nothing")
    return reading


def overlap(run: Bench) -> list[Comparison]:
    """Decode rates against reading what was missing and computing one after the other, at this run's rates."""
    full = run.enter(edger1(run, new(run, AMPLE_BYTES), memory=AMPLE_BYTES, expert_slots="100%"))
    asked(full, subject().task())
    reads = run.enter(
        Worker(
            "benchmarks.sides_streaming:reads",
            {"folder": subject().folder},
            child_environment(run.threads),
            within=new(run, 2 << 30).command,
        )
    )
    made: list[Comparison] = []
    for percent in (25, 50):
        limit = share(percent)
        ours = run.enter(edger1(run, new(run, limit), memory=limit))
        asked(ours, subject().task())
        readings = run.interleave({f"EdgeR1, {percent}%": partial(_overlapped, ours, full, reads)})
        taken = readings[f"EdgeR1, {percent}%"]
        reading = statistics.median(reading["read_share"] for reading in taken)
        run.notes.append(f"{percent}%: reading alone would take {reading:.0%} of the time of one after the other")
        made.append(
            Comparison(
                f"decode, {label(f'{percent}%')} / reads, then compute",
                side("EdgeR1", PRECISION, taken),
                side("one after the other", "computed from this run's rates", taken, "serial"),
                1.1 if 0.2 < reading < 0.8 else 0.9,
            )
        )
    return made


def _overlapped(ours: Worker, full: Worker, reads: Worker) -> Reading:
    task = subject().task(32)
    # Loading the model for another side has warmed its file.
    drop_caches()
    reading = _streamed(asked(ours, task))
    compute_s = 1 / asked(full, task)["rate"]
    missed = reading["bytes_per_token"]
    drop_caches()
    read_s = missed / reads.measure(bytes_per_token=missed)["bytes_per_s"] if missed else 0.0
    return {"rate": reading["rate"], "serial": 1 / (read_s + compute_s), "read_share": read_s / (read_s + compute_s)}


def guarded(part: Any, run: Bench) -> list[Comparison]:
    """Run a part; say loudly where no memory limit can be set here."""
    try:
        # Before gigabytes of models are made in vain.
        with Limited(1 << 30):
            made: list[Comparison] = part(run)
    except LimitUnavailableError as error:
        raise SideUnavailableError(str(error)) from error
    run.notes.append(_skew(subject()))
    return made


@cache
def _skew(of: Subject) -> str:
    found = of.model.measure(600, 3)

    def mean(name: str) -> float:
        return statistics.mean(getattr(skew, name) for skew in found)

    return (
        f"routing: the quarter of the experts used most takes {mean('share_of_top_quarter'):.0%} of the uses, "
        f"{mean('kept_from_token_to_token'):.0%} of a token's experts were the token's before; LRU with room for 50%, "
        f"25%, 12.5% would be hit at {mean('lru_50'):.2f}, {mean('lru_25'):.2f}, {mean('lru_12'):.2f}"
    )


ALL = {
    "slots100-llama": slots100_llama,
    "slots100-nunspark": slots100_nunspark,
    "warm50-llama": warm50_llama,
    "warm50-nunspark": warm50_nunspark,
    "cold25-llama": cold25_llama,
    "cold25-nunspark": cold25_nunspark,
    "ceiling": ceiling,
    "big": big,
    "resident": resident,
    "prefill": prefill,
    "overlap": overlap,
}


def _of_olmoe(part: Any, run: Bench) -> list[Comparison]:
    with measured("olmoe"):
        return guarded(part, run)


NOT_OF_OLMOE = ("big", *(name for name in ALL if name.endswith("-nunspark")))
"""nunspark reads no models of OLMoE's kind."""
PARTS = {name: partial(guarded, part) for name, part in ALL.items()} | {
    f"olmoe-{name}": partial(_of_olmoe, part) for name, part in ALL.items() if name not in NOT_OF_OLMOE
}

if __name__ == "__main__":
    raise SystemExit(bench.main("streaming", __doc__, PARTS))
