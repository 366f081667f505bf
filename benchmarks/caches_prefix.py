"""A further conversation behind a system prompt of 1,000 tokens, against the first one: part `prefix` of the caches."""

from __future__ import annotations

from functools import partial

from benchmarks import peers
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison

TOKENS = 1000


def prefix(run: Bench) -> list[Comparison]:
    """SmolLM2-135M: the time to the first token, where the system prompt was read for another conversation."""
    folder = str(peers.smollm2_folder())
    tokens = TOKENS // 4 if run.quick else TOKENS
    sides = {
        name: run.worker("sides_prefix:conversations", {"folder": folder, "tokens": tokens, "known": name == "known"})
        for name in ("known", "new")
    }
    readings = run.interleave({name: partial(worker.measure) for name, worker in sides.items()})
    last = readings["known"][-1]
    run.notes.append(
        f"prompt of {last['prompt']:.0f} tokens: {last['cached']:.0f} were there, {last['prefilled']:.0f} prefilled; "
        f"without the cache {readings['new'][-1]['prefilled']:.0f}"
    )
    for reading in readings["known"]:
        if reading["cached"] < tokens:
            raise RuntimeError(f"only {reading['cached']:.0f} tokens of the shared {tokens} were found again")
    return [
        Comparison(
            f"time to the first token behind {tokens:,} tokens, read before / new",
            side("EdgeR1", "read before", readings["known"], "first_token_s", "s"),
            side("EdgeR1", "new", readings["new"], "first_token_s", "s"),
            less_is_better=True,
        )
    ]


def main() -> int:
    """Measure."""
    from benchmarks import bench

    return bench.main("caches", __doc__, {"prefix": prefix})


if __name__ == "__main__":
    raise SystemExit(main())
