"""Fine-tuning: EdgeR1 against mlx-lm's trainer and mlx-lm-lora's rollouts as shipped, on SmolLM2-135M.

    python -m benchmarks.finetune                       # everything
    python -m benchmarks.finetune --only sft-speed      # one of sft-speed, sft-memory, grpo-rollouts

sft-speed       tokens a second of LoRA steps on the same chats, one row of 128 tokens; padding does not count
sft-memory      the most memory a process has resident while it takes steps on rows of 2,048 tokens
grpo-rollouts   tokens a second of a group of 8 completions of one prompt

All sides have the same 4-bit weights, rank and layers. Peers compute in f32, their fastest dtype on a CPU: in the 16
bits of the scales a step takes hours here. mlx-lm's trainer is slow on a CPU whatever the batch, hence the small rows
and its few readings; its memory is read once (half an hour), with gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import bench, finetune_data, peers, peers_finetune
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Measure
from benchmarks.worker import Side as Worker

ADAPTER = {"rank": 8, "scale": 20.0}
"""mlx-lm's defaults, over all projections of all layers."""
LENGTH, ROWS, LONG = 128, 1, 2048
SHORTEST = 96
PROBE_TOKENS, CHECKPOINTING_LENGTH = 16, 128
GROUP, ROLLOUT_TOKENS, ROLLOUT_PROBE_TOKENS = 8, 32, 2
SPEED_BAR, MEMORY_BAR, ROLLOUTS_BAR = 15.0, 0.6, 10.0
PEER_ROUNDS = 3


def sft_speed(run: Bench) -> list[Comparison]:
    """Tokens a second of whole steps."""
    folder = peers.smollm2_folder()
    data = finetune_data.chats(folder, SHORTEST, LENGTH)
    shared: dict[str, Any] = {"folder": str(folder), "data": str(data), "length": LENGTH, **ADAPTER}
    shipped, settings = run.shipped("sides_finetune:mlx_lm", {**shared, "rows": ROWS}, {"tokens": PROBE_TOKENS})
    ours = run.worker("sides_finetune:edger1", {**shared, "rows": ROWS})
    ours.measure()
    measures: dict[str, Measure] = {"ours": ours.measure}
    measures["theirs"] = partial(shipped.measure, tokens=PROBE_TOKENS) if run.quick else shipped.measure
    readings = run.interleave(measures, fewer={"theirs": PEER_ROUNDS})
    shape = f"{ROWS} row of {LENGTH}"
    return [
        Comparison(
            "LoRA steps / mlx-lm's trainer",
            side("EdgeR1", f"exact, activations held, {shape}", readings["ours"]),
            side("mlx-lm's trainer", f"as shipped, {settings}, {shape}", readings["theirs"]),
            SPEED_BAR,
        )
    ]


def sft_memory(run: Bench) -> list[Comparison]:
    """Peak memory of steps on long rows; mlx-lm's first, since it takes its time."""
    folder = peers.smollm2_folder()
    length = 256 if run.quick else LONG
    data = finetune_data.chats(folder, length, length)
    shared: dict[str, Any] = {"folder": str(folder), "data": str(data), "rows": 1, "length": length, **ADAPTER}
    shipped = {"EDGER1_KERNELS": "0", "MLX_DISABLE_COMPILE": "1"}
    peaks: dict[bool, float] = {}
    for checkpointing in (True, False):
        worker = run.worker("sides_finetune:mlx_lm", {**shared, "checkpointing": checkpointing}, **shipped)
        peaks[checkpointing] = worker.measure(tokens=CHECKPOINTING_LENGTH)["peak_bytes"]
        worker.close()
    better = min(peaks, key=lambda checkpointing: peaks[checkpointing])
    said = f"with{'' if better else 'out'} gradient checkpointing"
    megabytes = ", ".join(f"{'with' if on else 'without'} {peak / 1e6:,.0f} MB" for on, peak in peaks.items())
    run.notes.append(
        f"mlx-lm is measured {said}, which takes less at {CHECKPOINTING_LENGTH} tokens ({megabytes}); one reading"
    )
    peer = run.worker("sides_finetune:mlx_lm", {**shared, "checkpointing": better}, **shipped)
    theirs = run.interleave({"mlx-lm": peer.measure}, fewer={"mlx-lm": 1})["mlx-lm"]
    peer.close()
    found = []
    for number in range(run.rounds):
        worker = run.worker("sides_finetune:edger1", {**shared, "checkpointing": True})
        # The second step has the optimizer's state from the beginning.
        found.append([worker.measure() for _ in range(2)][-1])
        print(f"  EdgeR1 {number + 1}/{run.rounds}: {found[-1]['peak_bytes'] / 1e6:,.0f} MB", flush=True)
        worker.close()
    return [
        Comparison(
            f"peak memory, 1 row of {length} / mlx-lm's trainer",
            side("EdgeR1", "exact, activations computed again", found, "peak_bytes", "MB", per=1e6),
            side("mlx-lm's trainer", f"as shipped, f32, {said}", theirs, "peak_bytes", "MB", per=1e6),
            MEMORY_BAR,
            less_is_better=True,
            form="share",
        )
    ]


def grpo_rollouts(run: Bench) -> list[Comparison]:
    """Tokens a second of a group's completions, from its prompt to the last token."""
    folder, tokens = peers.smollm2_folder(), 8 if run.quick else ROLLOUT_TOKENS
    shared: dict[str, Any] = {"folder": str(folder), "prompt": _prompt(folder), "group": GROUP, "tokens": tokens}
    shared |= ADAPTER
    function, environment = "benchmarks.sides_finetune:mlx_lm_lora", peers_finetune.environment(run.threads)
    python = peers_finetune.mlx_lm_lora_python()
    shipped = run.enter(Worker(function, shared, environment, python=python))
    rates = {n: shipped.measure(together=n, tokens=ROLLOUT_PROBE_TOKENS)["rate"] for n in (1, GROUP)}
    together = max(rates, key=lambda n: rates[n])
    run.notes.append(
        f"mlx-lm-lora decodes {together} at a time, the faster in a probe ("
        + ", ".join(f"{n}: {rate:.3g} tok/s" for n, rate in rates.items())
        + ")"
    )
    ours = run.worker("sides_finetune:edger1_rollouts", shared)
    ours.measure()
    measures: dict[str, Measure] = {"ours": ours.measure, "theirs": partial(shipped.measure, together=together)}
    readings = run.interleave(measures, fewer={"theirs": PEER_ROUNDS})
    return [
        Comparison(
            f"rollouts, a group of {GROUP}, {tokens} tokens each / mlx-lm-lora",
            side("EdgeR1", "exact", readings["ours"]),
            side("mlx-lm-lora", f"as shipped, f32, {together} at a time", readings["theirs"]),
            ROLLOUTS_BAR,
        )
    ]


def _prompt(folder: Path) -> list[int]:
    from mlx_lm.utils import load_tokenizer

    messages = [{"role": "user", "content": "Write a long story about a lighthouse and the people who kept it."}]
    found: list[int] = load_tokenizer(folder).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    return found


PARTS: dict[str, Callable[[Bench], list[Comparison]]] = {
    "sft-speed": sft_speed,
    "sft-memory": sft_memory,
    "grpo-rollouts": grpo_rollouts,
}

if __name__ == "__main__":
    raise SystemExit(bench.main("finetune", __doc__, PARTS))
