"""Fine-tuning: an adapter taught to a model by examples (SFT), by rewards (GRPO) or by preferences (DPO)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edger1.train.finetune.run import Event, Result


def finetune(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    **tables: dict[str, Any],
) -> Result:
    """Teach a model from a file of rows; return the run's result, whose `folder` is the adapter's.

    `tables` are those of the settings file: `adapter`, `data`, `train` (with `method`) and the method's own. `on_event`
    is told of each step, and `stop` is asked after each. Everything runs on the calling thread.

    Raises UsageError for settings that cannot be, what opening the model and reading the data raise, DivergedError for
    a loss that is no number.
    """
    from edger1.mlx_runtime import prepare
    from edger1.train.finetune import settings

    given = settings.merged({"model": {"name": str(model)}, "data": {"path": str(data)}}, tables)
    found = settings.from_tables(given, "finetune")
    prepare()
    from edger1.train.finetune.opening import open_run

    opened = open_run(found, Path(output), resume=resume)
    try:
        return opened.finetuning.run(on_event, stop)
    finally:
        opened.policy.close()
