"""The peers that run models larger than memory: nunspark, and llama.cpp over a memory map.

nunspark comes from the package index into a virtual environment of its own, unmodified, with the versions of MLX and
mlx-lm that EdgeR1 has. It packs a model into a file for each expert. Its activations have the dtype of the scales, and
16-bit ones are several times slower on a CPU: it is given the same codes with scales in f32.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import peers
from benchmarks.cgroup import Limited
from benchmarks.common import REPOSITORY, child_environment
from benchmarks.peers import LlamaSettings, PeerMissingError

NUNSPARK = "0.13.0"

_PACK = """
import json, sys
from pathlib import Path
import mlx.core as mx
from nunspark.packer import pack
source, target = Path(sys.argv[1]), Path(sys.argv[2])
weights = {}
for file in sorted(source.glob("model*.safetensors")):
    weights |= mx.load(str(file))
wide = {n: w if w.dtype == mx.uint32 else w.astype(mx.float32) for n, w in weights.items()}
del weights
pack(source, target, weights=wide, config=json.loads((source / "config.json").read_text()))
"""


def nunspark_python() -> Path:
    """Return the interpreter of nunspark's environment, made on the first call.

    Raises PeerMissingError where the packages cannot be had.
    """
    home = peers.cache() / f"nunspark-{NUNSPARK}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"fetching nunspark {NUNSPARK} with pip", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        # -I: what PYTHONPATH holds of ours must not count as installed.
        pip = [python, "-I", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        mlx = "mlx[cpu]" if sys.platform == "linux" else "mlx"
        same = ["-c", REPOSITORY / "constraints.txt"]
        peers.run([*pip, *same, mlx, "mlx-lm", f"nunspark=={NUNSPARK}"], f"pip install nunspark=={NUNSPARK}")
        (home / "complete").touch()
    return python


def nunspark_packed(folder: Path) -> Path:
    """Return an MLX folder as nunspark packs it, a file for each expert, with scales in f32; made on the first call."""
    target = peers.cache() / f"{folder.name.removesuffix('-mlx')}-nunspark"
    if not (target / "manifest.json").exists():
        python = nunspark_python()
        with peers.made_whole(target) as unfinished:
            peers.run([python, "-I", "-c", _PACK, folder, unfinished], f"packing {folder.name} for nunspark")
    return target


@dataclass(frozen=True)
class NunsparkSettings:
    """What changes nunspark's speed. `budget_bytes` is what it may hold of weights that it streams."""

    budget_bytes: int
    expert_share: float = 0.9
    """Share of the budget that is for experts; the rest should hold all that is no expert."""
    lookahead: bool = False
    prefetch: bool = True
    io_threads: int = 1
    warm_window: int = 1

    def __str__(self) -> str:
        said = f"budget {self.budget_bytes / 1e9:.2f} GB, {self.expert_share:.0%} of it for experts"
        said += ", lookahead" if self.lookahead else ""
        said += "" if self.prefetch else ", no prefetch"
        return said + (f", {self.io_threads} threads, window {self.warm_window}" if self.io_threads > 1 else "")


def nunspark_settings(packed: Path, budget_bytes: int) -> NunsparkSettings:
    """Return settings for a budget that leave room for the pieces that are no experts, so that those stay."""
    manifest = json.loads((packed / "manifest.json").read_text("utf-8"))
    files = (packed / piece["file"] for piece in manifest["pieces"] if piece["piece_id"].endswith("_core"))
    core = sum(file.stat().st_size for file in files)
    return NunsparkSettings(budget_bytes, expert_share=max(0.1, min(0.97, 1 - 1.02 * core / budget_bytes)))


_TIMING = re.compile(r"(prompt eval|eval) time\s*=\s*([\d.]+) ms /\s*(\d+) (?:tokens|runs)")


@dataclass(frozen=True)
class Completion:
    """What llama-completion did: rates in tokens a second, and the text it added to the prompt."""

    prefill: float
    decode: float
    text: str


def timings(output: str) -> dict[str, float]:
    """Return tokens a second of "prompt eval" and "eval" out of llama-completion's own account."""
    found = {name: 1e3 * int(count) / float(ms) for name, ms, count in _TIMING.findall(output) if float(ms) > 0}
    if set(found) != {"prompt eval", "eval"}:
        raise PeerMissingError(f"llama-completion gave no account of its time: {output[-400:].strip()}")
    return found


def llama_completion(
    model: Path, settings: LlamaSettings, prompt: str, generate: int, *, threads: int, group: Limited
) -> Completion:
    """Continue a prompt greedily with llama.cpp over its memory map, in a cgroup.

    Its decode rate counts the evaluations after the first token, without sampling. Raises PeerMissingError where it
    fails or is killed.
    """
    # The first token comes out of the prefill.
    command = ["-m", model, "-p", prompt, "-n", generate + 1, "-t", threads, "-c", 2048, "--temp", 0, "--seed", 0]
    command += ["-no-cnv", "--no-display-prompt", "--no-warmup", "--ignore-eos", "--perf", "--simple-io"]
    command += ["-fa", "on" if settings.flash_attention else "off", "--repack" if settings.repack else "--no-repack"]
    done = subprocess.run(
        group.command([settings.build.tool("llama-completion"), *(str(word) for word in command)]),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        stdin=subprocess.DEVNULL,
        env=child_environment(threads),
    )
    if done.returncode != 0:
        killed = f"; killed {group.taken().oom_kills} times for want of memory" if group.taken().oom_kills else ""
        raise PeerMissingError(
            f"llama-completion ({settings}) failed (exit {done.returncode}{killed}): {done.stderr[-400:].strip()}"
        )
    rates = timings(done.stderr)
    return Completion(rates["prompt eval"], rates["eval"], done.stdout)


def mapped(settings: LlamaSettings) -> LlamaSettings:
    """Return the settings without repacking, which copies the whole model into memory that cannot be reclaimed."""
    return replace(settings, repack=False)


def nunspark_environment(threads: int) -> dict[str, str]:
    """Return the environment of a side that runs in nunspark's interpreter: no packages but its own."""
    return child_environment(threads) | {"PYTHONPATH": os.fspath(REPOSITORY)}
