"""Print the kept results as Markdown tables, for README.md and docs/.

python -m benchmarks.report            # all of benchmarks/results
python -m benchmarks.report speed      # one
"""

from __future__ import annotations

import json
import sys
from typing import Any

from benchmarks.common import RESULTS, Comparison, Side, print_table


def _side(kept: dict[str, Any]) -> Side:
    return Side(kept["name"], kept["settings"], kept["unit"], tuple(kept["readings"]))


def report(name: str) -> None:
    """Print one kept result: where and when it was measured, then its table."""
    kept = json.loads((RESULTS / f"{name}.json").read_text())
    machine = kept["machine"]
    print(
        f"`{kept['command']}`, {kept['date'][:10]}, commit {kept['commit'][:10]}"
        f"{' with uncommitted changes' if kept['uncommitted_changes'] else ''}; {machine['cpu']}, "
        f"{machine['physical_cores']} cores, {machine['memory_bytes'] / 1e9:.0f} GB, {machine['os']}; "
        + ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        + "\n"
    )
    print_table(
        [
            Comparison(line["what"], _side(line["ours"]), _side(line["peer"]), line["bar"], line["less_is_better"])
            for line in kept["comparisons"]
        ]
    )
    for note in kept["notes"]:
        print(f"\n{note}")
    print()


def main() -> int:
    """Print the results named on the command line, or all there are."""
    names = sys.argv[1:] or sorted(path.stem for path in RESULTS.glob("*.json"))
    if not names:
        print(f"there are no results in {RESULTS.name}/ yet; run make bench", file=sys.stderr)
        return 1
    for name in names:
        if not (RESULTS / f"{name}.json").exists():
            print(f"there is no result named {name}; there are: {', '.join(p.stem for p in RESULTS.glob('*.json'))}")
            return 1
        report(name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
