"""One conversion of one side in a process of its own.

    python -m benchmarks.convert_child SIDE SOURCE DESTINATION RECIPE

Prints one line of JSON: seconds from the start of the work to its end, with imports and opening, and the peak of the
process' resident memory as the kernel counted it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from benchmarks.cgroup import resident_of


def edger1(source: Path, destination: Path, recipe: str) -> None:
    """Convert as `edger1 convert SOURCE --to DESTINATION --recipe RECIPE` does."""
    from edger1.fetch.quantize import Wanted, convert
    from edger1.fetch.steps import Watch
    from edger1.quant import recipes  # type: ignore[import-untyped]
    from edger1.quant.converting import Settings  # type: ignore[import-untyped]

    convert(Wanted(str(source), destination, recipes.find(recipe)), Settings(), Watch())


def mlx_lm(source: Path, destination: Path, recipe: str) -> None:
    """Convert as `mlx_lm.convert -q` does, 4 bits in groups of 64."""
    from mlx_lm.convert import convert

    assert recipe == "4bit"
    convert(str(source), str(destination), quantize=True, q_bits=4, q_group_size=64)


def main() -> int:
    """Convert and tell what it took."""
    side, source, destination, recipe = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    shutil.rmtree(destination, ignore_errors=True)
    began = time.perf_counter()
    {"edger1": edger1, "mlx-lm": mlx_lm}[side](source, destination, recipe)
    took = time.perf_counter() - began
    written = sum(path.stat().st_size for path in destination.iterdir())
    shutil.rmtree(destination)
    print(json.dumps({"seconds": took, "peak_bytes": resident_of().peak, "written_bytes": written}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
