"""A distillation run from prompts to data set: `edger1 distill` without its command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edger1.train.distill import dataset
from edger1.train.distill.prompts import Prompts, without
from edger1.train.distill.sampling import Progress, Sampling, Settings, distinct
from edger1.train.distill.teachers import Teacher
from edger1.train.distill.verifying import Verifier
from edger1.train.store import Store

if TYPE_CHECKING:
    from edger1.train.rewards.opening import Rewards


def run(
    settings: Settings,
    teacher: Teacher,
    prompts: Prompts,
    rewards: Rewards | None,
    folder: Path,
    *,
    at_least: float = 1.0,
    evaluation: Sequence[str] = (),
    cache: Path | None = None,
    verified_by: Sequence[str] = (),
    command: str = "",
    license_: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    stop: Callable[[], bool] = lambda: False,
) -> dataset.Report:
    """Sample answers, verify them and write the data set into `folder`; see `sampling` and `dataset`.

    rewards: what verifies; None takes every answer that its teacher ended. evaluation: files whose prompts must not be
    among those asked. cache: the file of answers, `folder`/samples.sqlite where None; several runs may share one.
    verified_by, command, license_: for the card.

    Stopped early, it writes what there is. Raises TeacherError, RewardError, StoreError; answers are kept then, too.
    """
    questions, repeated = distinct(prompts.questions)
    in_evaluation = 0
    if evaluation:
        questions, in_evaluation = without(questions, evaluation)
    origin = dataset.Origin(
        prompts=prompts.name,
        given=len(prompts.questions),
        bad=prompts.bad,
        repeated=repeated,
        in_evaluation=in_evaluation,
        evaluation=tuple(Path(name).name for name in evaluation),
        rewards=tuple(verified_by),
        command=command,
        license=license_,
    )
    with Store(cache or folder / dataset.CACHE) as store:
        sampling = Sampling(settings, teacher, Verifier(rewards, at_least), questions, store)
        sampled = sampling.run(on_progress, stop)
    origin = replace(origin, reward_failures=getattr(rewards, "failed", 0))
    return dataset.write(folder, sampled, settings, teacher.about(), origin)
