"""The loop of fine-tuning: an adapter's weights moved by what a method says is better.

A step: the method's batches -> their losses and gradients, added up -> clip by the global norm -> AdamW. Nothing in it
depends on the time of day, on how many threads there are or on whether the run was ever stopped: from a checkpoint a
run goes on to the same weights, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from edger1.errors import UsageError
from edger1.mlx_runtime import clear_cache, set_cache_limit
from edger1.train import adamw, run_folder
from edger1.train.adamw import Table
from edger1.train.finetune import checkpoint, report
from edger1.train.finetune.checkpoint import Progress, State
from edger1.train.finetune.method import Evaluation, Method, Recording, Step
from edger1.train.finetune.policy import LocalPolicy
from edger1.train.finetune.settings import Settings
from edger1.train.log import Log
from edger1.train.ops import extension
from edger1.train.run_folder import DivergedError
from edger1.train.schedule import rate_share

CONFIG = "finetune.toml"

# Activations come and go in the same sizes; memory that went back to the system each time would have to be cleared
# page by page. What is held beyond the peak is less than this.
_CACHE_BYTES = 256 << 20

_BEGINNINGS = {CONFIG, "log.jsonl", "rollouts.jsonl", "samples.jsonl", "loss.png", "loss.svg",
               "reward.png", "reward.svg", "checkpoints", "cache"}  # fmt: skip
"""What a run that ended before its first checkpoint leaves."""


@dataclass(frozen=True)
class Event:
    """What a step did, for whoever shows it; `evaluation` where one followed. Step 0 is before training."""

    progress: Progress
    steps: int
    figures: dict[str, float]
    """Among them loss, grad_norm and tokens_per_s; none at step 0."""
    evaluation: Evaluation | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended: finished with an adapter, or stopped with a checkpoint to go on from."""

    finished: bool
    progress: Progress
    evaluation: dict[str, float]
    """The figures of the last measurement; empty without one."""
    folder: Path
    """The adapter's folder, or the checkpoint's."""
    best_step: int | None = None
    """The step that the adapter is of, where that is not the last one."""


class Finetuning:
    """A run in a folder of its own:

    finetune.toml    every setting
    log.jsonl        a line each step: {"step", "tokens", "loss", "rate", "grad_norm", "tokens_per_s", ...}, and each
                     measurement: {"step", "tokens", "evaluation": {...}}
    rollouts.jsonl   with rewards, every completion that was sampled; see rollout_log.py
    samples.jsonl    answers given at each measurement: {"step", "prompt", "text", "rewards"}
    loss.png         and reward.png where there are rewards; SVG where matplotlib is missing
    checkpoints/     see checkpoint.py
    cache/           what DPO's reference and distillation's teacher said, so that they say it once
    adapter/         the result, once finished, in mlx-lm's layout
    """

    def __init__(
        self, policy: LocalPolicy, method: Method, settings: Settings, run_folder: Path, *, resume: bool = False
    ) -> None:
        """Begin with the policy's adapter, or take the run up from its last checkpoint; nothing is written yet.

        `settings.train.steps` must be decided. Raises UsageError for a run that exists already or, with `resume`, one
        without a checkpoint, and FormatError for a checkpoint that is damaged or of another adapter.
        """
        check_folder(run_folder, resume=resume)
        if not policy.parameters():
            raise UsageError("The model has no adapter to train; open it with an AdapterSpec.")
        if settings.train.steps < 1:
            raise UsageError("[train] steps is 0; open_method decides it, or give it.")
        self.policy, self.method, self.settings, self.run_folder = policy, method, settings, run_folder
        if isinstance(method, Recording):
            method.log_to(run_folder)
        weights = policy.parameters()
        self._moments = {f"{kind}.{name}": mx.zeros_like(w) for kind in "mv" for name, w in weights.items()}
        train = settings.train
        self._rule = adamw.Rule(train.beta1, train.beta2, train.weight_decay)
        self._evaluate_every = train.evaluate_every or max(1, train.steps // 10)
        self._save_every = train.save_every or self._evaluate_every
        self.progress = Progress()
        self._evaluation: dict[str, float] = {}
        if resume:
            self._restore()

    def run(self, on_event: Callable[[Event], None] | None = None, stop: Callable[[], bool] = lambda: False) -> Result:
        """Train to the last step or an early end, or until `stop` says so after a step; save and return.

        Raises DivergedError where loss or gradient is not finite, before that step changes anything, and SaveError
        where something cannot be written. The last good checkpoint stays either way.
        """
        self.run_folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_settings(self.run_folder / CONFIG, self.settings.to_toml())
        log = Log(self.run_folder / "log.jsonl", self.progress.step)
        samples = Log(self.run_folder / "samples.jsonl", self.progress.step)
        steps = self.settings.train.steps
        with _memory_kept():
            if self.progress.step == 0 and not stop():
                evaluation = self._evaluate(log, samples)
                if on_event and evaluation is not None:
                    on_event(Event(self.progress, steps, {}, evaluation))
            while self.progress.step < steps and not self.progress.ended and not stop():
                self._one_step(log, samples, on_event)
        self._draw(log)
        folder = self._save()
        if self.progress.step < steps and not self.progress.ended:
            return Result(False, self.progress, self._evaluation, folder)
        return self._finish()

    def _one_step(self, log: Log, samples: Log, on_event: Callable[[Event], None] | None) -> None:
        train = self.settings.train
        began = time.perf_counter()
        tokens, figures = self._train()
        seconds = time.perf_counter() - began
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + tokens,
            seconds=self.progress.seconds + seconds,
        )
        step, last = self.progress.step, self.progress.step == train.steps
        figures["tokens_per_s"] = round(tokens / seconds, 1)
        if step % train.log_every == 0 or last:
            log.write({"step": step, "tokens": self.progress.tokens, **figures})
        evaluation = None
        if step % self._evaluate_every == 0 or last:
            evaluation = self._evaluate(log, samples)
            self._draw(log)
        if step % self._save_every == 0 and not last and not self.progress.ended:
            self._save()
        if on_event:
            on_event(Event(self.progress, train.steps, figures, evaluation))

    def _train(self) -> tuple[int, dict[str, float]]:
        """Do one step; return how many tokens counted, and its figures."""
        number, train = self.progress.step, self.settings.train
        _seed(train.seed, number, 0)
        step = self.method.step(self.policy, number)
        loss, sums, gradients = self._gradients(step, number)
        norm = _number(adamw.global_norm(gradients, extension())) if gradients else 0.0
        if not math.isfinite(loss + norm):
            raise self._diverged(loss, norm)
        share = rate_share(number, train)
        if gradients:
            self._move(gradients, share * train.learning_rate, adamw.clipped(norm, train.clip))
        return step.tokens, {"loss": loss, "rate": share, "grad_norm": norm, **sums, **step.figures}

    def _gradients(self, step: Step, number: int) -> tuple[float, dict[str, float], Table]:
        loss, sums, gradients = 0.0, dict[str, float](), Table()
        for i, batch in enumerate(step.batches):
            _seed(self.settings.train.seed, number, i + 1)
            value, figures, found = self.policy.value_and_grad(partial(self.method.loss, self.policy, batch))
            loss += _number(value)
            if not math.isfinite(loss):
                raise self._diverged(loss, math.nan)
            for name, figure in figures.items():
                sums[name] = sums.get(name, 0.0) + _number(figure)
            gradients = {n: gradients[n] + g for n, g in found.items()} if gradients else found
            mx.eval(gradients)
        return loss, sums, gradients

    def _move(self, gradients: Table, rate: float, scale: float) -> None:
        kernels, weights = extension(), Table()
        for name, weight in self.policy.parameters().items():
            m, v = self._moments.pop(f"m.{name}"), self._moments.pop(f"v.{name}")
            weights[name], self._moments[f"m.{name}"], self._moments[f"v.{name}"] = adamw.update(
                weight, gradients[name], m, v, self._rule,
                step=self.progress.step + 1, rate=rate, scale=scale, kernels=kernels,
            )  # fmt: skip
        mx.eval(weights, self._moments)
        self.policy.assign(weights)

    def _evaluate(self, log: Log, samples: Log) -> Evaluation | None:
        _seed(self.settings.train.seed, self.progress.step, -1)
        found = self.method.evaluate(self.policy, self.progress.step)
        if found is None:
            return None
        step = self.progress.step
        self._evaluation = found.figures
        log.write({"step": step, "tokens": self.progress.tokens, "evaluation": found.figures})
        for sample in found.samples:
            samples.write({"step": step, **asdict(sample)})
        if self.progress.best is None or found.better > self.progress.best:
            self.progress = replace(self.progress, best=found.better, best_step=step, stale=0)
            if step and self.settings.train.keep == "best":
                self._save_adapter(checkpoint.best(self.run_folder))
        else:
            patience = self.settings.train.patience
            stale = self.progress.stale + 1
            self.progress = replace(self.progress, stale=stale, ended=bool(patience) and stale >= patience)
        return found

    def _diverged(self, loss: float, norm: float) -> DivergedError:
        what = f"The loss is {loss}" + ("" if math.isnan(norm) else f" and the gradient's norm {norm}")
        return run_folder.diverged(self.run_folder, self.progress.step + 1, what)

    def _save(self) -> Path:
        values, arrays = self.method.state()
        state = State(
            self.progress,
            {f"weights.{n}": w for n, w in self.policy.parameters().items()}
            | self._moments
            | {f"method.{n}": mx.array(a) for n, a in arrays.items()},
            values,
        )
        return checkpoint.save(self.run_folder, state, self._save_adapter)

    def _save_adapter(self, folder: Path) -> None:
        train = self.settings.train
        self.policy.save(folder, {"method": train.method, "step": self.progress.step, "seed": train.seed})

    def _finish(self) -> Result:
        """Put the result in its place."""
        best, last = self.progress.best_step, self.progress.step
        destination = self.run_folder / "adapter"
        kept = checkpoint.best(self.run_folder)
        if self.settings.train.keep == "best" and best and best != last and kept.is_dir():
            report.copy_folder(kept, destination)
            return Result(True, self.progress, self._evaluation, destination, best)
        self._save_adapter(destination)
        return Result(True, self.progress, self._evaluation, destination)

    def _restore(self) -> None:
        folder = run_folder.latest(self.run_folder)
        assert folder is not None
        state = checkpoint.load(folder)
        arrays = dict(state.arrays)
        weights = _taken(arrays, "weights.")
        method = {name: np.array(value) for name, value in _taken(arrays, "method.").items()}
        self._same(folder, weights, self.policy.parameters())
        self._same(folder, arrays, self._moments)
        self.policy.assign(weights)
        self._moments = arrays
        self.progress = state.progress
        self.method.restore(state.values, method)

    def _same(self, folder: Path, found: Table, expected: Table) -> None:
        shapes = {n: w.shape for n, w in found.items()}, {n: w.shape for n, w in expected.items()}
        if shapes[0] != shapes[1]:
            differing = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
            raise UsageError(
                f"{folder} is of another model or adapter than the settings describe: {differing[0]} is "
                f"{shapes[0].get(differing[0], 'missing')}, expected {shapes[1].get(differing[0], 'none')}; go on with "
                f"the run's own {CONFIG}."
            )

    def _draw(self, log: Log) -> None:
        # A plot is no reason to end a run.
        with suppress(OSError):
            report.draw(self.run_folder, log.entries)


def check_folder(run: Path, *, resume: bool) -> None:
    """Raise UsageError where a run cannot begin in a folder or, with `resume`, go on from it."""
    run_folder.check(run, _BEGINNINGS, resume=resume)


def _seed(seed: int, step: int, batch: int) -> None:
    """Make what is drawn from here on depend on these alone."""
    mx.random.seed(((seed * 1_000_003 + step) * 1_009 + batch + 1) % 2**63)


@contextmanager
def _memory_kept() -> Iterator[None]:
    before = set_cache_limit(_CACHE_BYTES)
    try:
        yield
    finally:
        set_cache_limit(before)
        clear_cache()


def _taken(arrays: Table, prefix: str) -> Table:
    """Take the arrays of a prefix out of a table, and return them without it."""
    return {name.removeprefix(prefix): arrays.pop(name) for name in list(arrays) if name.startswith(prefix)}


def _number(value: Any) -> float:
    return float(cast(float, value.item()))
