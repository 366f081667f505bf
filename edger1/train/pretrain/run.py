"""Pretraining: all weights of a model built from a config, on packed documents, to predict the next token.

A step: rows of packed documents -> losses and their gradients -> clip by the global norm -> Muon and AdamW -> move the
routers' biases against their experts' load. Nothing in it depends on the time of day, on how many threads there are
or on whether the run was ever stopped: from a checkpoint a run goes on to the same losses, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from edger1.errors import UsageError
from edger1.kernels.install import install
from edger1.mlx_runtime import clear_cache, set_cache_limit
from edger1.train import run_folder
from edger1.train.adamw import Table, global_norm
from edger1.train.log import Log
from edger1.train.ops import Ops, extension
from edger1.train.pretrain import checkpoint, export, losses, model, report, schedule
from edger1.train.pretrain.checkpoint import Progress
from edger1.train.pretrain.corpus import Corpus
from edger1.train.pretrain.forward import routers
from edger1.train.pretrain.optimizer import Optimizer, trained
from edger1.train.pretrain.packing import Place, Rows
from edger1.train.pretrain.settings import Settings, to_toml
from edger1.train.run_folder import DivergedError
from edger1.train.schedule import rate_share

# Gradients and activations of a step come and go in the same sizes; memory that went back to the system each time
# would have to be cleared page by page.
_CACHE_BYTES = 8 << 30


_BEGINNINGS = {"config.toml", "log.jsonl", "loss.svg", "experts.svg", "checkpoints"}
"""What a run that ended before its first checkpoint leaves."""


@dataclass(frozen=True)
class Event:
    """What a step did, for whoever shows it; `held_out` where an evaluation followed."""

    progress: Progress
    steps: int
    loss: float
    mtp_loss: float
    tokens_per_s: float
    held_out: dict[str, float] | None = None


@dataclass(frozen=True)
class Result:
    """How a run ended: finished with a model, or stopped with a checkpoint to go on from."""

    finished: bool
    progress: Progress
    held_out: dict[str, float]
    folder: Path
    """The model's folder, or the checkpoint's."""


class Pretraining:
    """A run in a folder of its own:

    config.toml     every setting
    log.jsonl       see log.py
    loss.svg, experts.svg
    checkpoints/    see checkpoint.py
    model/          the result, once finished
    """

    def __init__(
        self, corpus: Corpus, config: dict[str, Any], settings: Settings, run: Path, *, resume: bool = False
    ) -> None:
        """Build the model, or take it up from the run's last checkpoint; nothing is written yet.

        Raises UsageError for a config that does not hang together or is not that of the model to start from, a run that
        exists already or, with `resume`, one without a checkpoint, and FormatError for a checkpoint or model that is
        damaged.
        """
        run_folder.check(run, _BEGINNINGS, resume=resume)
        if settings.loss_on == "assistant" and not corpus.train.counted.any():
            raise UsageError(f"{corpus.folder} holds no assistant turn, and [train] loss_on counts nothing else.")
        self.corpus, self.settings, self.run_folder = corpus, settings, run
        self.model = model.build(config, corpus.vocabulary, settings.hidden_std, settings.seed)
        known = {"vocab_size": corpus.vocabulary, "bos_token_id": corpus.first, "eos_token_id": corpus.last}
        self.config = model.complete(config, known)
        self.ops = Ops(settings.precision == "mixed")
        self.optimizer = Optimizer(model.parameters(self.model), settings, self.ops)
        counted_only = settings.loss_on == "assistant"
        length, pad = settings.length, corpus.pad
        self.rows = Rows(corpus.train, length, pad, settings.seed, counted_only=counted_only)
        self.held_out = Rows(corpus.held_out, length, pad, 0, counted_only=counted_only, shuffle=False)
        self.progress = Progress()
        self._loads: list[mx.array] = []
        if resume:
            self._restore()
        elif settings.start_from:
            self._start_from(Path(settings.start_from))
        self._gradient = mx.value_and_grad(self._loss)
        self._measured: dict[str, float] = {}

    def describe(self) -> str:
        """Return the plan in a line: the model's size, the data's, and how much of it the run will see."""
        weights = model.parameters(self.model).values()
        seen = self.settings.steps * self.settings.tokens_per_step
        corpus = self.corpus.train
        return (
            f"{sum(w.size for w in weights) / 1e6:.2f}M parameters, {model.active_parameters(self.config) / 1e6:.2f}M "
            f"active a token; {len(corpus):,} documents of {corpus.tokens / 1e6:.1f}M tokens; "
            f"{self.settings.steps:,} steps of {self.settings.tokens_per_step:,} tokens "
            f"({seen / corpus.tokens:.1f} epochs), from step {self.progress.step}; "
            f"products in {'bf16' if self.ops.mixed else 'f32'}"
        )

    def run(
        self,
        on_event: Callable[[Event], None] | None = None,
        stop: Callable[[], bool] = lambda: False,
        minutes: float | None = None,
    ) -> Result:
        """Train to the last step, until `stop` says so after a step, or for so many minutes; save and return.

        Raises DivergedError where loss or gradient is not finite, before that step changes anything, and SaveError
        where a checkpoint cannot be written. The last good checkpoint stays either way.
        """
        self.run_folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_settings(self.run_folder / "config.toml", to_toml(self.config, self.settings))
        log = Log(self.run_folder / "log.jsonl", self.progress.step)
        limit = time.perf_counter() + 60 * minutes if minutes is not None else math.inf
        installed = install(self.model, "exact", fuse=False)
        cache = set_cache_limit(_CACHE_BYTES)
        try:
            while self.progress.step < self.settings.steps and not stop() and time.perf_counter() < limit:
                self._one_step(log, on_event)
        finally:
            installed.uninstall()
            set_cache_limit(cache)
            clear_cache()
        self._draw(log)
        if self.progress.step < self.settings.steps:
            return Result(False, self.progress, self._measured, self._save())
        self._save()
        folder = self.run_folder / "model"
        export.export(folder, self.model, self.config, self.corpus.folder)
        return Result(True, self.progress, self._measured, folder)

    def _one_step(self, log: Log, on_event: Callable[[Event], None] | None) -> None:
        s = self.settings
        began = time.perf_counter()
        main, ahead, norm, counted = self._train()
        seconds = time.perf_counter() - began
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            tokens=self.progress.tokens + counted,
            seconds=self.progress.seconds + seconds,
        )
        step = self.progress.step
        held_out = None
        last = step == s.steps
        if step % s.log_every == 0 or last:
            log.write(self._entry(main, ahead, norm, counted / seconds))
        if (step % s.evaluate_every == 0 or last) and len(self.corpus.held_out):
            held_out = self._measured = self._evaluate()
            log.write({"step": step, "tokens": self.progress.tokens, "held_out": held_out})
            self._draw(log)
        if step % s.save_every == 0 and not last:
            self._save()
        if on_event:
            on_event(Event(self.progress, s.steps, main, ahead, counted / seconds, held_out))

    def _train(self) -> tuple[float, float, float, int]:
        """Do one step; return its losses, gradient norm and how many tokens counted."""
        step, s = self.progress.step, self.settings
        batch, place = self.rows.next(self.progress.place, s.rows)
        weights = {n: w for n, w in model.parameters(self.model).items() if trained(n)}
        (_, parts), gradients = self._gradient(weights, batch, schedule.mtp_weight(step, s))
        norm = global_norm(gradients, extension())
        mx.eval(parts, norm, gradients)
        main, ahead, length = (_number(a) for a in (parts["main"], parts["ahead"], norm))
        if not math.isfinite(main + ahead + length):
            # The weights that the gradient was taken at are traced arrays by now.
            model.assign(self.model, weights)
            raise self._diverged(main + ahead, length)
        share = rate_share(step, s)
        model.assign(self.model, self.optimizer.update(weights, gradients, share, length))
        if parts["loads"].size:
            losses.move_biases(self.model, parts["loads"], s.balance_speed)
            self._loads.append(parts["loads"])
        del weights, gradients
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.progress = replace(self.progress, place=place)
        return main, ahead, length, int(_number(batch.weights.sum()))

    def _loss(self, weights: Table, batch: losses.Batch, mtp_weight: float) -> tuple[mx.array, Table]:
        model.assign(self.model, weights)
        found = losses.compute(self.model, batch, self.ops)
        whole = losses.total(found, mtp_weight, self.settings.balance_loss)
        return whole, {k: mx.stop_gradient(v) for k, v in asdict(found).items()}

    def _evaluate(self) -> dict[str, float]:
        """Return the mean losses over the first rows of the held-out documents."""
        s, place = self.settings, Place()
        rows = min(s.evaluate_rows, self.held_out.epoch_rows(0))
        sums, counts = [0.0, 0.0], [0.0, 0.0]
        for first in range(0, rows, s.rows):
            batch, place = self.held_out.next(place, min(s.rows, rows - first))
            found = losses.compute(self.model, batch, self.ops)
            for i, (loss, weights) in enumerate(((found.main, batch.weights), (found.ahead, batch.ahead_weights))):
                count = _number(weights.sum())
                sums[i] += _number(loss) * count
                counts[i] += count
        means = [total / max(1.0, count) for total, count in zip(sums, counts, strict=True)]
        return dict(zip(("loss", "mtp_loss"), means, strict=True))

    def _entry(self, main: float, ahead: float, norm: float, rate: float) -> dict[str, Any]:
        s, step = self.settings, self.progress.step
        entry: dict[str, Any] = {
            "step": step,
            "tokens": self.progress.tokens,
            "loss": main,
            "mtp_loss": ahead,
            "rate": rate_share(step - 1, s),
            "mtp_weight": schedule.mtp_weight(step - 1, s),
            "grad_norm": norm,
            "tokens_per_s": round(rate, 1),
        }
        if self._loads:
            use = mx.stack(self._loads).sum(axis=0)
            use = use / use.sum(axis=-1, keepdims=True)
            entry["experts"] = np.round(np.array(use), 5).tolist()
            self._loads = []
        return entry

    def _diverged(self, loss: float, norm: float) -> DivergedError:
        what = f"The loss is {loss} and the gradient's norm {norm}"
        return run_folder.diverged(self.run_folder, self.progress.step + 1, what)

    def _save(self) -> Path:
        state = {f"weights.{n}": w for n, w in model.parameters(self.model).items()} | self.optimizer.state
        # Expert use since the last entry of the log.
        if self._loads:
            state["loads"] = mx.stack(self._loads).sum(axis=0)
        return checkpoint.save(self.run_folder, self.progress, self.model, self.config, self.corpus.folder, state)

    def _start_from(self, folder: Path) -> None:
        trained_model, _ = export.load(folder)
        weights = model.parameters(trained_model)
        self._same(folder, weights, model.parameters(self.model))
        model.assign(self.model, weights)

    def _restore(self) -> None:
        folder = run_folder.latest(self.run_folder)
        assert folder is not None
        self.progress, state = checkpoint.load(folder)
        loads = state.pop("loads", None)
        self._loads = [] if loads is None else [loads]
        weights = {n.removeprefix("weights."): state.pop(n) for n in list(state) if n.startswith("weights.")}
        self._same(folder, weights, model.parameters(self.model))
        self._same(folder, state, self.optimizer.state)
        model.assign(self.model, weights)
        self.optimizer.state = state
        self.optimizer.step = self.progress.step

    def _same(self, folder: Path, found: Table, expected: Table) -> None:
        shapes = {n: w.shape for n, w in found.items()}, {n: w.shape for n, w in expected.items()}
        if shapes[0] != shapes[1]:
            differing = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
            raise UsageError(
                f"{folder} is of another model or optimizer than the config describes ({differing[0]} differs); "
                "go on with the run's own config.toml."
            )

    def _draw(self, log: Log) -> None:
        # A plot is no reason to end a run.
        with suppress(OSError):
            report.draw(self.run_folder, log.entries, list(routers(self.model)))


def _number(value: mx.array) -> float:
    return float(cast(float, value.item()))
