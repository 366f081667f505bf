"""Use the chat for as long as it is given, with new luck each time: `make soak`, or `python scripts/soak.py [MINUTES]`.

Keys, clicks, sizes and what the engine does come from a seed (tests/monkey.py). The first fault ends it and names the
seed, which `python scripts/soak.py --seed N` plays again.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import monkey

from edger1.tui import base

STEPS = 150


def main() -> int:
    """Play one seed after the other; 1 where one fails."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("minutes", nargs="?", type=float, default=30.0)
    asked.add_argument("--seed", type=int, help="play this one alone")
    given = asked.parse_args()
    # A conversation gets its name within a game.
    base.NAME_AFTER_S = 0.05
    end, seed, played = time.monotonic() + 60 * given.minutes, given.seed or time.time_ns() % 10**9, 0
    while played == 0 or (given.seed is None and time.monotonic() < end):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["EDGER1_HOME"] = str(Path(folder) / "home")
            # What is exported goes to where the program was started.
            os.chdir(folder)
            try:
                monkey.play(seed, Path(folder), STEPS)
            except BaseException:
                print(f"seed {seed} failed after {played} others", file=sys.stderr)
                raise
        played, seed = played + 1, seed + 1
        if played % 20 == 0:
            print(f"{played} played, up to seed {seed - 1}", flush=True)
    print(f"{played} played, none failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
