"""Feed the readers of weights mutated headers: whatever comes, they answer with a model or with one sentence.

    python scripts/fuzz.py                         # every target in turn, 200,000 inputs each
    python scripts/fuzz.py gguf --runs 1000000     # one of them
    python scripts/fuzz.py gguf build/fuzz/gguf-crash-...  # again what failed before

Inputs are bred by coverage (atheris, on libFuzzer) from true files of every format; tests/fuzzing.py makes them into
files. A run fails on any exception but EdgeR1Error, on a message that is longer than a person would read, on more
memory than a header may cost, and on an input that takes many seconds. What failed is kept under build/fuzz, and so is
what was bred, for the next run to begin with.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("safetensors", "header", "tensors", "config", "index", "gguf")
MEMORY_MB = 600
TIMEOUT_S = 600
LONGEST = 8192


def instrument(module: ModuleType) -> None:
    """Let atheris see which branches of a module an input takes."""
    import atheris

    for _, item in inspect.getmembers(module):
        if inspect.isfunction(item) and item.__module__ == module.__name__:
            atheris.instrument_func(item)
        elif inspect.isclass(item) and item.__module__ == module.__name__:
            for _, method in inspect.getmembers(item, inspect.isfunction):
                if method.__module__ == module.__name__:
                    atheris.instrument_func(method)


def fuzz(name: str, place: Path, left: list[str]) -> None:
    """Run one target in this process, with files in `place`; libFuzzer ends the process."""
    import atheris
    import fuzzing

    corpus = ROOT / "build" / "fuzz" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(fuzzing.seeds(name)):
        (corpus / f"seed-{number}").write_bytes(seed)
    target = getattr(fuzzing.Targets(place), name)
    for module in fuzzing.MODULES:
        instrument(module)
    # libFuzzer leaves without a word to Python: what is to be known afterwards is written at once.
    count = os.open(place / "count", os.O_CREAT | os.O_WRONLY)
    reached = 0

    def one(data: bytes) -> None:
        nonlocal reached
        reached += fuzzing.answers(target, data)
        os.pwrite(count, b"%d" % reached, 0)

    options = [f"-max_len={LONGEST}", f"-timeout={TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MB}"]
    options += [f"-artifact_prefix={corpus.parent}{os.sep}{name}-", *left]
    if all(argument.startswith("-") for argument in left):
        options.append(str(corpus))
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def run(name: str, runs: int, left: list[str]) -> tuple[int, bool]:
    """Run a target in a process of its own: how many inputs reached the reader, and whether all was well."""
    begun = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        command = [sys.executable, __file__, name, "--place", place, "--runs", str(runs), *left]
        paths = [str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace")
        count = Path(place) / "count"
        reached = int(count.read_text() or 0) if count.exists() else 0
    if done.returncode:
        print(done.stderr[-6000:], file=sys.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    print(
        f"{name}: {reached:,} inputs reached the reader in {time.monotonic() - begun:,.0f} s, "
        f"{covered[-1] if covered else 'no'} branches seen, {'FAILED' if done.returncode else 'ok'}",
        flush=True,
    )
    return reached, not done.returncode


def main() -> int:
    """Run the targets one after another and say how many inputs they took."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("target", nargs="?", choices=NAMES)
    parser.add_argument("--runs", type=int, default=200_000)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    chosen, left = parser.parse_known_args()
    if chosen.place:
        fuzz(chosen.target, chosen.place, [f"-runs={chosen.runs}", *left])
        return 0
    results = {name: run(name, chosen.runs, left) for name in ([chosen.target] if chosen.target else NAMES)}
    failed = [name for name, (_, well) in results.items() if not well]
    total = sum(reached for reached, _ in results.values())
    print(f"{total:,} inputs in all; {'failed: ' + ', '.join(failed) if failed else 'no failure'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
