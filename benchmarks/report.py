"""Print the kept results as Markdown tables, for README.md and docs/.

python -m benchmarks.report            # all of benchmarks/results
python -m benchmarks.report speed      # one
python -m benchmarks.report --bars     # only what has a bar, one table
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks import kept
from benchmarks.common import RESULTS, print_table

DISTURBED_SPREAD = 0.25
"""Readings that lie further apart than this, or a read bandwidth so far below the best that this machine showed in any
kept part, mean that the machine was not quiet."""


def report(name: str) -> None:
    """Print one kept result, part by part: where and when it was measured, then its table."""
    best = best_bandwidth()
    for part_name, part in kept.parts(name).items():
        machine = part["machine"]
        print(
            f"### {name}: {part_name}\n\n`{part['command']}`, {part['date'][:10]}, commit {part['commit'][:10]}"
            f"{' with uncommitted changes' if part['uncommitted_changes'] else ''}; {machine['cpu']}, "
            f"{machine['physical_cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['os']}; "
            + ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
            + f"; {quietness(part, best.get(machine['cpu'], 0.0))}\n"
        )
        print_table(kept.comparisons(part))
        for note in part["notes"]:
            print(f"\n{note}")
        print()


def best_bandwidth() -> dict[str, float]:
    """Return the highest read bandwidth in GB/s among all kept parts, for each kind of processor."""
    best: dict[str, float] = {}
    for name in kept.names():
        for part in kept.parts(name).values():
            cpu = part["machine"]["cpu"]
            best[cpu] = max([best.get(cpu, 0.0), *(part["conditions"].get("read_bandwidth_gb_s") or [])])
    return best


def quietness(part: dict[str, Any], best: float = 0.0) -> str:
    """Say how quiet the machine was while a part was measured; `best` is its read bandwidth when it is, in GB/s."""
    rates = part["conditions"].get("read_bandwidth_gb_s") or []
    worst = max((side.spread for line in kept.comparisons(part) for side in (line.ours, line.peer)), default=0.0)
    said = [f"read bandwidth {min(rates):.1f} to {max(rates):.1f} GB/s"] if rates else []
    said.append(f"readings within {worst:.0%}")
    if "stolen_share" in part["conditions"]:
        said.append(f"{part['conditions']['stolen_share']:.1%} of processor time taken by the host")
    if worst > DISTURBED_SPREAD or (rates and 1 - min(rates) / max(best, *rates) > DISTURBED_SPREAD):
        said.append("DISTURBED: measure it again")
    return ", ".join(said)


def main() -> int:
    """Print the results named on the command line, or all there are."""
    bars = "--bars" in sys.argv[1:]
    there = kept.names()
    names = [word for word in sys.argv[1:] if word != "--bars"] or there
    if not names:
        print(f"there are no results in {RESULTS.name}/ yet; run make bench", file=sys.stderr)
        return 1
    if unknown := [name for name in names if name not in there]:
        print(f"there is no result named {unknown[0]}; there are: {', '.join(there)}", file=sys.stderr)
        return 1
    if bars:
        lines = [line for name in names for part in kept.parts(name).values() for line in kept.comparisons(part)]
        print_table([line for line in lines if line.bar is not None])
        return 0
    for name in names:
        report(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
