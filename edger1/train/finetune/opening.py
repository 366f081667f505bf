"""From settings to a run that is ready: the model loaded, the data read, sizes decided."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edger1.train import run_folder
from edger1.train.finetune import methods, plan
from edger1.train.finetune.method import Closing, Method
from edger1.train.finetune.policy import LocalPolicy, open_policy
from edger1.train.finetune.run import Finetuning, check_folder
from edger1.train.finetune.settings import Settings


@dataclass(frozen=True)
class Opened:
    """A run that is ready; close it afterwards."""

    policy: LocalPolicy
    method: Method
    settings: Settings
    finetuning: Finetuning

    def close(self) -> None:
        """Drop the weights, and end what the method keeps running, such as the process of its rewards."""
        if isinstance(self.method, Closing):
            self.method.close()
        self.policy.close()

    def plan_lines(self) -> list[str]:
        """Return what the run will take, for a reader; measures the rate on a few tokens, which takes seconds."""
        train, length = self.settings.train, self.settings.data.length
        if not (train.rows and train.accumulate and length):
            return [f"{train.steps:,} steps"]
        return plan.Plan(
            train.steps - self.finetuning.progress.step,
            train.accumulate,
            train.rows,
            length,
            plan.memory(plan.anatomy(self.policy), train.rows, length),
            plan.ceiling(train.memory),
            plan.measure(self.policy, length),
        ).lines()


def open_run(settings: Settings, run_folder: Path, *, resume: bool = False) -> Opened:
    """Load the model that the settings name, put its adapter over it, and read the method's data.

    Raises what opening a model, an adapter or data raises, UsageError for a run that exists already or, with `resume`,
    has no checkpoint, and MemoryCeilingError where a batch does not fit.
    """
    check_folder(run_folder, resume=resume)
    model, train = settings.model, settings.train
    policy = open_policy(
        model.name,
        settings.adapter,
        seed=train.seed,
        checkpointing=train.checkpointing == "on",
        adapter=_start(run_folder, model.adapter, resume=resume),
    )
    try:
        method, settings = methods.find(train.method).open(policy, settings)
        return Opened(policy, method, settings, Finetuning(policy, method, settings, run_folder, resume=resume))
    except BaseException:
        policy.close()
        raise


def _start(run: Path, adapter: str, *, resume: bool) -> Path | None:
    """Return the adapter to begin with; one that was begun with says what the run's adapter is like."""
    if not adapter:
        return None
    found = run_folder.latest(run) if resume else None
    return Path(adapter) if found is None else found / "adapter"
