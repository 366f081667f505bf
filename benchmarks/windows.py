"""Optimistic windows on a device that is slow to be read back. SIMULATED: no Apple GPU was measured.

python -m benchmarks.windows [--only PART] [--quick] [--results FOLDER]

`edger1/experts/windows.py` runs as it would on a Mac, over a device whose read-back and whose layers cost what is set
(`edger1/experts/device.py`); the time is virtual. What is counted is how often it reads back and how many layers it
computes; experts are read from memory, and for nothing. Both sides are EdgeR1: W chosen while running, and reading back
in every layer.

synthetic: 48 MoE layers, each of whose calls finds all its experts with a set probability, independently.
nano-moe: the trained model with banks of 12 to 28 slots of its 32 experts (least recently used leaves), greedy answers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from benchmarks import common, kept
from benchmarks.common import Comparison, Side
from benchmarks.memory_bank import MemoryBank, stream
from edger1.experts.device import SimulatedDevice
from edger1.experts.window_width import WidthController, token_seconds
from edger1.experts.windows import Windows, install
from edger1.train import plot

COMPUTE_S = 0.44e-3
"""A layer's work: what bigrig gives for Qwen3-30B-A3B, where a layer's wait is 2 ms."""
SYNCS_S = (0.0, 0.25e-3, 0.5e-3, 1e-3, 1.5e-3, 2e-3, 3e-3)
SHOWN_S = 2e-3
WIDTHS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 48)
FULL_HITS = (0.3, 0.57, 0.7, 0.8, 0.9, 0.97)
SLOTS = (12, 16, 20, 24, 28)
LAYERS, EXPERTS, TOP_K = 48, 32, 4
NOTE = "SIMULATED, unmeasured on hardware: virtual time of a device with set costs, 0.44 ms a layer"


class Controller(WidthController):
    """Counts full hits; with a width given, that is the one for all tokens."""

    def __init__(self, layers: int, fixed: int | None) -> None:
        super().__init__(layers)
        self.fixed = fixed
        self.asked = self.full = 0

    def hit(self, layer: int, full: bool) -> None:
        super().hit(layer, full)
        self.asked += 1
        self.full += full

    def next(self, layers: Sequence[int], decoder_layers: int) -> int:
        return self.fixed or super().next(layers, decoder_layers)


@dataclass
class Run:
    """What some tokens took."""

    tokens: int
    read_backs: float
    layers: float
    full_hit: float
    widths: list[int] = field(default_factory=list)
    answer: Any = None

    def seconds(self, sync_s: float) -> float:
        return (self.read_backs * sync_s + self.layers * COMPUTE_S) / self.tokens


class Chooser(nn.Module):
    """In place of a router: finds all its experts in the bank with a set probability."""

    def __init__(self, full_hit: float, seed: int) -> None:
        super().__init__()
        self.experts = _Values()
        self.bank = MemoryBank(self, EXPERTS // 2)
        self.bank.ensure(range(EXPERTS // 2))
        self._full_hit, self._rng = full_hit, random.Random(seed)
        self._chosen: tuple[int, Any] = (-1, None)

    def choose(self, token: int) -> Any:
        if self._chosen[0] != token:
            there = np.flatnonzero(self.bank.table >= 0).tolist()
            chosen = self._rng.sample(there, TOP_K)
            if self._rng.random() >= self._full_hit:
                chosen[0] = self._rng.choice(np.flatnonzero(self.bank.table < 0).tolist())
            self._chosen = token, mx.array([[chosen]], mx.uint32)
        return self._chosen[1]


class _Values(nn.Module):
    num_experts = EXPERTS

    def __init__(self) -> None:
        super().__init__()
        self.weight = mx.random.normal((EXPERTS, 1))


class SyntheticLayer(nn.Module):
    def __init__(self, full_hit: float, seed: int) -> None:
        super().__init__()
        self.switch = Chooser(full_hit, seed)
        self.slots: Callable[[], Any] | None = None

    def __call__(self, x: Any) -> Any:
        assert self.slots is not None
        return x * 0.5 + mx.take(self.switch.experts.weight, self.slots(), axis=0).sum(-2)


class SyntheticModel(nn.Module):
    """Layers of nothing but experts, of one number each."""

    def __init__(self, full_hit: float, seed: int) -> None:
        super().__init__()
        mx.random.seed(seed)
        self.layers = [SyntheticLayer(full_hit, 1000 * seed + i) for i in range(LAYERS)]
        self.token = -1

    def give(self, windows: Windows) -> None:
        for i, layer in enumerate(self.layers):
            layer.slots = lambda i=i, layer=layer: windows.slots(i, layer.switch.choose(self.token))

    def __call__(self, inputs: Any) -> Any:
        x = inputs[..., None].astype(mx.float32)
        for layer in self.layers:
            x = layer(x)
        return x


def synthetic(full_hit: float, width: int | None, sync_s: float, tokens: int, seed: int = 0) -> Run:
    """Run tokens through the synthetic model; the first quarter is not counted."""
    model, device = SyntheticModel(full_hit, seed), SimulatedDevice(sync_s, COMPUTE_S)
    switches = [layer.switch for layer in model.layers]
    windows = install(model, switches, [switch.bank for switch in switches], device)
    model.give(windows)
    windows.controller = Controller(LAYERS, width)

    def steps() -> Iterable[Any]:
        for model.token in range(tokens):
            yield model(mx.array([[model.token]]))

    return _counted(windows, device, steps(), tokens // 4)


def nano(slots: int, width: int | None, sync_s: float, tokens: int, prompts: Sequence[str]) -> Run:
    """Let nano-moe answer prompts greedily, its experts in banks of so many slots."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load

    model, tokenizer = load(str(common.REPOSITORY / "edger1" / "assets" / "nano-moe"))
    model.set_dtype(mx.float32)
    device = SimulatedDevice(sync_s, COMPUTE_S)
    windows, banks = stream(model, slots, device)
    windows.controller = Controller(len(banks), width)

    def steps() -> Iterable[Any]:
        for prompt in prompts:
            caches = make_prompt_cache(model)
            ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
            token = int(mx.argmax(model(mx.array([ids]), cache=caches)[0, -1]).item())
            for _ in range(tokens):
                logits = model(mx.array([[token]]), cache=caches)
                token = int(mx.argmax(logits[0, -1]).item())
                yield mx.array(token)

    run = _counted(windows, device, steps(), tokens)
    assert not windows.reason, windows.reason
    return run


def _counted(windows: Windows, device: SimulatedDevice, steps: Iterable[Any], warm_up: int) -> Run:
    controller: Any = windows.controller
    began, answers, widths = (0, 0, 0, 0), [], []

    def counts() -> tuple[int, int, int, int]:
        return device.read_backs, device.layers, controller.asked, controller.full

    for number, answer in enumerate(steps, 1):
        answers.append(np.array(answer).reshape(-1)[0])
        if number == warm_up:
            began = counts()
        if number > warm_up:
            widths.append(windows._width)
    read_backs, layers, asked, full = (after - before for after, before in zip(counts(), began, strict=True))
    return Run(len(widths), read_backs, layers, full / asked, widths, np.array(answers))


def measure_synthetic(options: argparse.Namespace) -> tuple[list[Comparison], dict[str, Any]]:
    tokens = 24 if options.quick else 96
    rows: list[dict[str, Any]] = []
    comparisons = []
    for full_hit in FULL_HITS:
        fixed = {width: synthetic(full_hit, width, SHOWN_S, tokens) for width in WIDTHS}
        _same_answers(fixed.values())
        for width, run in fixed.items():
            rows.append(_row(full_hit, width, run) | {"expected_ms": _expected_ms(full_hit, width)})
        for sync_s in SYNCS_S:
            chosen = [synthetic(full_hit, None, sync_s, tokens, seed) for seed in range(options.rounds)]
            rows.append(_row(full_hit, None, chosen[0], sync_s))
            comparisons.append(_compared(f"full hits {full_hit:.2f}", sync_s, chosen, fixed[1]))
        _log(f"full hits {full_hit}", rows)
    return comparisons, {"rows": rows}


def measure_nano(options: argparse.Namespace) -> tuple[list[Comparison], dict[str, Any]]:
    tokens = 12 if options.quick else 48
    demo = (common.REPOSITORY / "edger1" / "assets" / "nano-moe" / "demo.jsonl").read_text("utf-8").splitlines()
    chosen = demo[:: len(demo) // (2 if options.quick else 3)]
    prompts = [json.loads(line)["question"] for line in chosen]
    rows: list[dict[str, Any]] = []
    comparisons = []
    for slots in SLOTS:
        fixed = {width: nano(slots, width, SHOWN_S, tokens, prompts) for width in (1, 2, 3, 5)}
        windowed = {sync_s: nano(slots, None, sync_s, tokens, prompts) for sync_s in (1e-3, SHOWN_S)}
        _same_answers([*fixed.values(), *windowed.values()])
        hit = fixed[1].full_hit
        for width, run in fixed.items():
            rows.append(_row(hit, width, run) | {"slots": slots})
        for sync_s, run in windowed.items():
            rows.append(_row(hit, None, run, sync_s) | {"slots": slots})
            comparisons.append(_compared(f"{slots} of 32 slots, full hits {hit:.2f}", sync_s, [run], fixed[1]))
        _log(f"{slots} slots", rows)
    return comparisons, {"rows": rows}


def _row(full_hit: float, width: int | None, run: Run, sync_s: float = SHOWN_S) -> dict[str, Any]:
    return {
        "full_hit": round(full_hit, 4),
        "width": width or "chosen",
        "mean_width": round(float(np.mean(run.widths)), 2),
        "sync_ms": sync_s * 1e3,
        "read_backs_per_token": round(run.read_backs / run.tokens, 3),
        "layers_per_token": round(run.layers / run.tokens, 3),
        "ms_per_token": round(run.seconds(sync_s) * 1e3, 4),
    }


def _expected_ms(full_hit: float, width: int) -> float:
    return round(token_seconds(width, [full_hit] * LAYERS, SHOWN_S, COMPUTE_S) * 1e3, 4)


def _compared(what: str, sync_s: float, chosen: Sequence[Run], each: Run) -> Comparison:
    readings = tuple(run.seconds(sync_s) * 1e3 for run in chosen)
    widths = np.mean([np.mean(run.widths) for run in chosen])
    ours = Side("EdgeR1", f"W chosen, {widths:.1f} on average; simulated", "ms/token", readings)
    peer = Side("EdgeR1", "reading back in every layer; simulated", "ms/token", (each.seconds(sync_s) * 1e3,))
    return Comparison(f"{what}, {sync_s * 1e3:g} ms a read-back", ours, peer, less_is_better=True)


def _same_answers(runs: Iterable[Run]) -> None:
    first, *others = runs
    if any(not np.array_equal(first.answer, run.answer) for run in others):
        raise AssertionError("a width changed an answer")


def _log(what: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"  {what}: {rows[-1]}", file=sys.stderr, flush=True)


def draw(part: dict[str, Any], folder: Path) -> None:
    """Draw the synthetic part: how many times faster, over W and over the cost of a read-back."""
    rows = part["rows"]
    each = {row["full_hit"]: row for row in rows if row["width"] == 1}

    def times_faster(row: dict[str, Any]) -> float:
        base = each[row["full_hit"]]
        before = base["read_backs_per_token"] * row["sync_ms"] + base["layers_per_token"] * COMPUTE_S * 1e3
        return float(before / row["ms_per_token"])

    def line(hit: float, x: Callable[[dict[str, Any]], float], of: Callable[[dict[str, Any]], bool]) -> plot.Line:
        mine = [row for row in rows if row["full_hit"] == hit and of(row)]
        return plot.Line(f"full hits {hit:.2f}", [x(row) for row in mine], [times_faster(row) for row in mine])

    y = "times faster than reading back in every layer"
    widths = [
        line(hit, lambda row: row["width"], lambda row: row["width"] != "chosen" and row["width"] <= 24)
        for hit in FULL_HITS
    ]
    syncs = [line(hit, lambda row: row["sync_ms"], lambda row: row["width"] == "chosen") for hit in FULL_HITS]
    title = "Simulated, not measured on hardware: 48 layers of 0.44 ms"
    drawings = {
        "windows-width.svg": (f"{title}, 2 ms a read-back", "W, layers between read-backs", widths),
        "windows-sync.svg": (f"{title}, W chosen while running", "ms a read-back", syncs),
    }
    for name, (heading, x, lines) in drawings.items():
        (folder / name).write_text(plot.lines(heading, x, y, lines), encoding="utf-8")


PARTS = {"synthetic": measure_synthetic, "nano-moe": measure_nano}


def main() -> int:
    made = common.parser(__doc__)
    made.set_defaults(rounds=2)
    options = made.parse_args()
    if unknown := set(options.only) - set(PARTS):
        made.error(f"--only {unknown.pop()}: expected one of {', '.join(PARTS)}")
    if options.quick:
        options.rounds = 1
    for name in options.only or PARTS:
        comparisons, seen = PARTS[name](options)
        common.print_table(comparisons)
        print(f"note: {NOTE}")
        if options.quick and options.results == common.RESULTS:
            print("a shortened run: not written to benchmarks/results (give --results FOLDER to keep it)")
            continue
        conditions = {"simulated": True, "compute_ms": COMPUTE_S * 1e3, **seen}
        kept.save("windows", name, comparisons, notes=[NOTE], conditions=conditions, folder=options.results)
        if name == "synthetic":
            draw(seen, options.results)
        print(f"kept: windows.json, {name}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
