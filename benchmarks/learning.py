"""What fine-tuning teaches nano-dense: by examples, by rewards beside a control, and by a teacher's traces.

    python -m benchmarks.learning                   # all parts; a part that stopped goes on where it was
    python -m benchmarks.learning --only sft        # to its plateau on worked solutions
    python -m benchmarks.learning --only grpo       # from there, three seeds, beside rejection sampling
    python -m benchmarks.learning --only distill    # verified traces beside unverified ones

The task is reasoning-gym's linear equations, which the nano models never saw: `learning_tasks.py` has its difficulty,
which was fixed before anything was trained on it. Runs lie in EDGER1_BENCH_CACHE or ~/.cache/edger1-bench.

The control of GRPO samples as many completions to the same prompts from the model that GRPO starts from, keeps the
right ones, and learns from them, supervised, over as many completion tokens as GRPO's updates learned from.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import common, kept
from benchmarks import learning_runs as runs
from benchmarks.common import Comparison, Side
from benchmarks.learning_runs import Right, tell
from benchmarks.learning_tasks import EQUATIONS as TASK
from benchmarks.learning_tasks import questions
from edger1.train import plot

HELD_OUT = 400
THROUGH_THE_RUN = 128
WORKED, TERSE = 400, 400
SEEDS = (1, 2, 3)
SFT_BAR, GRPO_BAR = 30.0, 10.0

SFT: dict[str, dict[str, Any]] = {
    "data": {"length": 256, "validation_share": 0.04},
    "train": {
        "epochs": 7.0, "rows": 8, "accumulate": 1, "learning_rate": 3e-3, "evaluate_every": 15, "keep": "last",
        "samples": 0, "checkpointing": "off",
    },
}  # fmt: skip
GRPO: dict[str, dict[str, Any]] = {
    "train": {
        "method": "grpo", "steps": 32, "learning_rate": 3e-4, "schedule": "cosine", "keep": "last",
        "evaluate_every": 8, "samples": 0, "checkpointing": "off",
    },
    "grpo": {
        "group": 8, "prompts": 8, "mini_batches": 2, "max_tokens": runs.MAX_TOKENS,
        "evaluate_prompts": 1,
    },
    "rewards": {"use": [f"gym:{TASK.name}"]},
}  # fmt: skip
CONTROL: dict[str, Any] = {
    "learning_rate": 3e-4, "rows": 4, "accumulate": 1, "keep": "last", "evaluate_every": 1000, "samples": 0,
    "checkpointing": "off",
}  # fmt: skip
STUDENT: dict[str, dict[str, Any]] = {
    "data": {"length": 256, "validation_share": 0.0, "deduplicate": False},
    "train": {
        "epochs": 10.0, "rows": 8, "accumulate": 1, "learning_rate": 3e-3, "evaluate_every": 1000, "keep": "last",
        "samples": 0, "checkpointing": "off",
    },
}  # fmt: skip
TAUGHT = 500
PROMPTS = 2000
PATIENCE = 3
"""Measurements without a better one after which SFT has come to its plateau."""


def work() -> Path:
    """Return the folder of the runs."""
    cache = os.environ.get("EDGER1_BENCH_CACHE") or Path.home() / ".cache" / "edger1-bench"
    return Path(cache).expanduser() / "learning"


def held_out() -> list[Any]:
    """Return the questions that accuracy is told of."""
    return questions(TASK, "held-out", HELD_OUT)


def accuracy_of(name: str, adapter: Path | None) -> dict[str, Right]:
    """Return the accuracy of an adapter by a name."""
    return runs.accuracy_of(work() / "accuracy" / name, TASK, held_out(), adapter)


@cache
def plateau() -> Path:
    """Return the adapter that supervised fine-tuning ends with, which is trained where it is not there yet."""
    found = questions(TASK, "traces", WORKED + TERSE)
    rows = [q.messages() if i < WORKED else q.without_steps() for i, q in enumerate(found)]
    data = runs.write_rows(work() / "traces.jsonl", [{"messages": row} for row in rows])
    tables = {**SFT, "data": {**SFT["data"], "path": str(data)}}
    return runs.train(work() / "sft", tables, sampled, _no_longer_grows)


def sampled(policy: Any) -> Right:
    """Return the share right, at temperature 1, of the questions that are asked through a run."""
    return runs.accuracy(policy, TASK, held_out()[:THROUGH_THE_RUN], temperature=1.0)


def _no_longer_grows(curve: list[tuple[int, float]]) -> bool:
    best = max(range(len(curve)), key=lambda i: curve[i][1], default=0)
    return len(curve) - 1 - best >= PATIENCE


def reward_prompts() -> Path:
    """Write the questions that GRPO and its control sample answers to."""
    return runs.prompts(work() / "prompts.jsonl", questions(TASK, "rewards", PROMPTS))


def grpo(seed: int) -> Path:
    """Return the adapter that GRPO makes of the plateau's."""
    validation = runs.prompts(work() / "held-out.jsonl", held_out()[:THROUGH_THE_RUN])
    tables = {
        **GRPO,
        "model": {"name": str(runs.MODEL), "adapter": str(plateau())},
        "data": {"path": str(reward_prompts()), "validation": str(validation), "length": 256},
        "train": {**GRPO["train"], "seed": seed},
    }
    return runs.train(work() / f"grpo-{seed}", tables, sampled)


def spent(seed: int) -> dict[str, int]:
    """Return what a run of GRPO took: completions and tokens sampled, tokens learned from, and right completions."""
    lines = _rollouts(seed)
    return {
        "completions": len(lines),
        "sampled": sum(line["tokens"] for line in lines),
        "learned": sum(line["tokens"] for line in lines if not line["skipped"]),
    }


def _rollouts(seed: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work() / f"grpo-{seed}" / "rollouts.jsonl").read_text().splitlines()]


def control(seed: int) -> Path:
    """Return the adapter of rejection sampling with what a run of GRPO took."""
    grpo(seed)
    taken, folder = spent(seed), work() / f"control-{seed}"
    data = folder.with_suffix(".jsonl")
    if not data.is_file():
        _reject(data, seed)
    right = json.loads(data.with_suffix(".json").read_text())
    # A step's rows hold about as many completions as GRPO samples for one of its steps, and the steps' tokens add up to
    # as many completion tokens as GRPO learned from.
    tables: dict[str, dict[str, Any]] = {
        "model": {"name": str(runs.MODEL), "adapter": str(plateau())},
        "data": {"path": str(data), "length": 256, "validation_share": 0.0, "deduplicate": False},
        "train": {**CONTROL, "seed": seed, "epochs": taken["learned"] / right["tokens"]},
    }
    return runs.train(folder, tables)


def _reject(path: Path, seed: int) -> None:
    """Sample as many completions to the same prompts from the plateau's model as GRPO did; write the right ones."""
    from edger1.train.finetune.policy import open_policy

    group = GRPO["grpo"]["group"]
    numbers = {line["number"]: int(re.findall(r"\d+", line["prompt"])[-1]) - 1 for line in _rollouts(seed)}
    every = questions(TASK, "rewards", PROMPTS)
    asked = [every[numbers[number]] for number in sorted(numbers)]
    policy = open_policy(runs.MODEL, adapter=plateau())
    try:
        given = runs.answers(policy, asked, temperature=1.0, group=group, seed=seed)
    finally:
        policy.close()
    pairs = [(asked[i // group], rollout) for i, rollout in enumerate(given)]
    kept_ones = [(q, r) for q, r in pairs if runs.is_right(TASK, q, r.text, r.finished)]
    rows = [
        {"messages": [*q.messages()[:1], {"role": "assistant", "content": f"<think>\n{r.text}"}]} for q, r in kept_ones
    ]
    counts = {
        "completions": len(given), "sampled": sum(len(r.ids) for r in given), "right": len(rows),
        "tokens": sum(len(r.ids) for _, r in kept_ones),
    }  # fmt: skip
    tell(f"control-{seed}: {counts}")
    path.with_suffix(".json").write_text(json.dumps(counts))
    runs.write_rows(path, rows)


def teacher() -> Path:
    """Return the folder of the plateau's model with the adapter fused, which `edger1 distill` asks."""
    folder = work() / "teacher"
    if not (folder / "config.json").is_file():
        runs.command("fuse", str(runs.MODEL), "--adapter", str(plateau()), "--output", str(folder))
    return folder


def student(name: str) -> Path:
    """Return the adapter of nano-dense taught by the teacher's "verified" or "unverified" traces."""
    rows = _taught(name)
    size = min(len(_taught("verified")), len(_taught("unverified")))
    data = runs.write_rows(work() / f"{name}.jsonl", rows[:size])
    tables = {**STUDENT, "data": {**STUDENT["data"], "path": str(data)}}
    return runs.train(work() / f"student-{name}", tables)


def _taught(name: str) -> list[dict[str, Any]]:
    """Return the rows that `edger1 distill` makes: a prompt's shortest accepted answer of four, or one answer."""
    asked = runs.prompts(work() / "teacher.jsonl", questions(TASK, "rewards", TAUGHT, seed=2))
    folder = work() / f"traces-{name}"
    if not (folder / "data.jsonl").is_file():
        how = ["--verify", f"gym:{TASK.name}", "-n", "4"] if name == "verified" else ["--unverified", "-n", "1"]
        runs.command(
            "distill", "--teacher", str(teacher()), "--prompts", str(asked), *how, "--temperature", "1", "--max-tokens",
            str(runs.MAX_TOKENS), "--precision", "exact", "--output", str(folder),
        )  # fmt: skip
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def sft_part() -> tuple[list[Comparison], list[str]]:
    """Accuracy before and after supervised fine-tuning to its plateau."""
    after = accuracy_of("sft", plateau())
    before = accuracy_of("base", None)
    log = [line for line in runs.log_of(work() / "sft") if "loss" in line]
    curve = ", ".join(f"{step}: {share:.0%}" for step, share in runs.curve_of(work() / "sft"))
    notes = [
        f"{TASK.name} of reasoning-gym, {dict(TASK.settings)}; {WORKED} worked solutions and "
        f"{TERSE} bare answers, LoRA of rank {runs.RANK}.",
        f"Ended after step {log[-1]['step']}, {log[-1]['tokens']:,} answer tokens. Right by step, of the first "
        f"{THROUGH_THE_RUN} held-out questions: {curve}.",
        f"Greedy: {before['greedy']} before, {after['greedy']} after. Sampled at temperature 1: {before['sampled']}, "
        f"{after['sampled']}.",
    ]
    return [
        _gain(f"SFT to its plateau, held-out accuracy, {how}", [after[how]], "before", [before[how]], SFT_BAR)
        for how in ("greedy", "sampled")
    ], notes


def grpo_part() -> tuple[list[Comparison], list[str]]:
    """GRPO from the plateau, over it and over rejection sampling."""
    ours, theirs, notes = [], [], []
    start = accuracy_of("sft", plateau())
    for seed in SEEDS:
        ours.append(accuracy_of(f"grpo-{seed}", grpo(seed)))
        theirs.append(accuracy_of(f"control-{seed}", control(seed)))
        took, right = spent(seed), json.loads((work() / f"control-{seed}.json").read_text())
        learned = [line["tokens"] for line in runs.log_of(work() / f"control-{seed}") if "loss" in line][-1]
        notes.append(
            f"Seed {seed}. GRPO: {took['completions']:,} completions, {took['sampled']:,} tokens, of which "
            f"{took['learned']:,} learned from; greedy {ours[-1]['greedy']}, sampled {ours[-1]['sampled']}. Control: "
            f"{right['completions']:,} completions of the same prompts, {right['sampled']:,} tokens, "
            f"{right['right']:,} right; {learned:,} tokens learned from; greedy {theirs[-1]['greedy']}, sampled "
            f"{theirs[-1]['sampled']}."
        )
    notes.append(f"The plateau: greedy {start['greedy']}, sampled {start['sampled']}.")
    lines = []
    for how in ("greedy", "sampled"):
        got, held = [each[how] for each in ours], [each[how] for each in theirs]
        bar = GRPO_BAR if how == "sampled" else None
        lines += [
            _gain(f"GRPO over the plateau, {how}", got, "plateau", [start[how]], bar),
            _gain(f"GRPO over rejection-sampling SFT, {how}", got, "rejection sampling", held, bar),
        ]
    return lines, notes


def distill_part() -> tuple[list[Comparison], list[str]]:
    """Students of verified and of unverified traces."""
    found = {name: accuracy_of(f"student-{name}", student(name)) for name in ("verified", "unverified")}
    counts = {name: len((work() / f"{name}.jsonl").read_text().splitlines()) for name in found}
    notes = [
        f"{name}: {counts[name]} traces; greedy {right['greedy']}, sampled {right['sampled']}."
        for name, right in found.items()
    ]
    notes.append(f"The teacher is the plateau's model at temperature 1; {TAUGHT} prompts; the student is nano-dense.")
    return [
        _gain(
            f"student of verified traces, {how}",
            [found["verified"][how]],
            "of unverified",
            [found["unverified"][how]],
            None,
        )
        for how in ("greedy", "sampled")
    ], notes


def _gain(what: str, ours: list[Right], name: str, peer: list[Right], bar: float | None) -> Comparison:
    def side(name: str, shares: list[Right]) -> Side:
        return Side(name, f"{shares[0].asked} questions", "% right", tuple(100 * right.share for right in shares))

    return Comparison(what, side("EdgeR1", ours), side(name, peer), bar, form="gain")


def draw(folder: Path) -> None:
    """Draw the held-out accuracy through the runs that are there, as SVG."""
    sft = runs.curve_of(work() / "sft")
    if not sft:
        return
    series = [plot.Line("SFT", [step for step, _ in sft], [100 * share for _, share in sft])]
    begin = sft[-1][0]
    for seed in SEEDS:
        found = runs.curve_of(work() / f"grpo-{seed}")
        if found:
            y = [100 * share for _, share in found]
            series.append(plot.Line(f"GRPO, seed {seed}", [begin + step for step, _ in found], y))
    for seed in SEEDS:
        path = work() / "accuracy" / f"control-{seed}"
        if path.is_dir():
            right = runs.accuracy_of(path, TASK, [], None)["sampled"].share
            last = runs.log_of(work() / f"control-{seed}")[-1]["step"]
            y = [100 * sft[-1][1], 100 * right]
            series.append(plot.Line(f"control, seed {seed}", [begin, begin + last], y))
    folder.mkdir(parents=True, exist_ok=True)
    title = f"nano-dense learns {TASK.name.replace('_', ' ')}"
    (folder / "learning.svg").write_text(
        plot.lines(title, "optimizer steps", "held-out questions right, %", series), "utf-8"
    )


PARTS: dict[str, Callable[[], tuple[list[Comparison], list[str]]]] = {
    "sft": sft_part,
    "grpo": grpo_part,
    "distill": distill_part,
}


def main() -> int:
    """Run the parts asked for; print and keep each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", action="append", default=[], choices=list(PARTS), help="only this part; repeatable")
    parser.add_argument("--results", type=Path, default=common.RESULTS, help="folder the result is written to")
    options = parser.parse_args()
    for name in options.only or PARTS:
        lines, notes = PARTS[name]()
        common.print_table(lines)
        for note in notes:
            print(f"note: {note}")
        kept.save("learning", name, lines, notes=notes, conditions={}, folder=options.results)
        draw(options.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
