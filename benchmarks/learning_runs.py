"""What the learning experiments share: data files, runs that are taken up where they stopped, held-out accuracy."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY
from benchmarks.learning_tasks import Question, Task, dataset

MODEL = REPOSITORY / "recipes" / "nano" / "weights" / "nano-dense"
MAX_TOKENS = 64
RANK = 32


@dataclass(frozen=True)
class Right:
    """How many of the questions asked were answered right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.right / self.asked

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95% interval of the share."""
        z, n, p = 1.96, self.asked, self.share
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)

    def __str__(self) -> str:
        low, high = self.interval()
        return f"{self.share:.1%} ({low:.1%} to {high:.1%} of {self.asked})"


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines, and return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def traces(path: Path, questions: Sequence[Question]) -> Path:
    """Write questions with worked solutions."""
    return write_rows(path, [{"messages": q.messages()} for q in questions])


def prompts(path: Path, questions: Sequence[Question]) -> Path:
    """Write questions with what reasoning-gym's grader takes, and no solution."""
    rows = [
        {"messages": q.messages()[:1], "answer": q.answer, "metadata": dict(q.entry["metadata"])} for q in questions
    ]
    return write_rows(path, rows)


def answers(policy: Any, questions: Sequence[Question], *, temperature: float, group: int, seed: int) -> list[Any]:
    """Return `group` rollouts for each question."""
    from edger1.train.finetune.rollouts import Decoding, make_prompt, roll_out

    asked = [make_prompt(str(i), q.messages()[:1], {}, policy.tokenizer) for i, q in enumerate(questions)]
    return roll_out(policy, asked, group, Decoding(MAX_TOKENS, temperature), seed)


def is_right(task: Task, question: Question, text: str, finished: bool) -> bool:
    """Whether reasoning-gym gives what follows the thoughts its full score; an answer that did not end is wrong."""
    _, closed, answer = text.rpartition("</think>")
    grader = _GRADERS.setdefault(task.name, dataset(task, 1, 0))
    return bool(finished and closed and grader.score_answer(answer.strip(), question.entry) == 1)


_GRADERS: dict[str, Any] = {}


def accuracy(policy: Any, task: Task, questions: Sequence[Question], temperature: float = 0.0) -> Right:
    """Ask each question once, greedily or at a temperature."""
    given = answers(policy, questions, temperature=temperature, group=1, seed=0)
    right = sum(is_right(task, q, r.text, r.finished) for q, r in zip(questions, given, strict=True))
    return Right(right, len(questions))


def accuracy_of(folder: Path, task: Task, questions: Sequence[Question], adapter: Path | None) -> dict[str, Right]:
    """Return the accuracy of nano-dense with an adapter, greedy and at temperature 1; kept beside the adapter."""
    from edger1.train.finetune.policy import open_policy

    path = folder / "accuracy.json"
    if not path.is_file():
        policy = open_policy(MODEL, adapter=adapter)
        try:
            found = {name: accuracy(policy, task, questions, t) for name, t in (("greedy", 0.0), ("sampled", 1.0))}
        finally:
            policy.close()
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({name: [r.right, r.asked] for name, r in found.items()}) + "\n")
        tell(f"{folder.name}: greedy {found['greedy']}, sampled {found['sampled']}")
    return {name: Right(*counts) for name, counts in json.loads(path.read_text()).items()}


def train(
    folder: Path,
    tables: Mapping[str, Mapping[str, Any]],
    measure: Callable[[Any], Right] | None = None,
    stop: Callable[[list[tuple[int, float]]], bool] = lambda curve: False,
) -> Path:
    """Train as `edger1 finetune` does, or go on with a run that stopped; returns the adapter's folder.

    `measure` is called at each of the run's measurements, and `stop` with (step, share right) of all so far ends it.
    They are kept in `curve.jsonl`.
    """
    from edger1.train import run_folder
    from edger1.train.finetune.opening import open_run
    from edger1.train.finetune.settings import from_tables

    if (folder / "adapter").is_dir():
        return folder / "adapter"
    # A run that ended before its first checkpoint begins anew in the same folder.
    resume = run_folder.latest(folder) is not None
    settings = from_tables(
        {"model": {"name": str(MODEL)}, "adapter": {"rank": RANK}, **tables}, "the experiment's settings"
    )
    opened = open_run(settings, folder, resume=resume)
    curve = curve_of(folder) if resume else []

    def on_event(event: Any) -> None:
        if event.figures and event.progress.step % 10 == 0:
            shown = ", ".join(
                f"{name} {event.figures[name]:.3g}"
                for name in ("loss", "reward_gym", "tokens_per_s")
                if name in event.figures
            )
            tell(f"{folder.name} step {event.progress.step} of {event.steps}: {shown}")
        if event.evaluation is None or measure is None:
            return
        right = measure(opened.policy)
        tell(f"{folder.name} step {event.progress.step}: {right}")
        curve.append((event.progress.step, right.share))
        with (folder / "curve.jsonl").open("a") as file:
            file.write(json.dumps({"step": event.progress.step, "right": right.right, "asked": right.asked}) + "\n")

    try:
        for line in (*opened.policy.describe(), *opened.method.describe()):
            tell(f"  {line}")
        result = opened.finetuning.run(on_event, lambda: stop(curve))
    finally:
        opened.policy.close()
    if not result.finished:
        import shutil

        shutil.copytree(result.folder / "adapter", folder / "adapter")
    return folder / "adapter"


def curve_of(folder: Path) -> list[tuple[int, float]]:
    """Return (step, share right) of a run's measurements."""
    path = folder / "curve.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    # A run that was taken up may have measured a step twice.
    return sorted({line["step"]: line["right"] / line["asked"] for line in lines}.items())


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def command(*words: str) -> None:
    """Run `edger1` with these words; raises CalledProcessError where it fails."""
    subprocess.run([sys.executable, "-m", "edger1", *words], check=True)


def tell(line: str) -> None:
    """Say something while a run goes on."""
    print(line, file=sys.stderr, flush=True)
