"""Logit distillation opened from a run's settings: SFT's data, and a teacher with the same tokenizer."""

from __future__ import annotations

from pathlib import Path

from edger1.train import tables
from edger1.train.finetune import sft
from edger1.train.finetune.distill_settings import DistillSettings
from edger1.train.finetune.logit_distill import LogitDistill, check_tokenizers
from edger1.train.finetune.method import Batch
from edger1.train.finetune.policy import LocalPolicy, open_policy
from edger1.train.finetune.settings import Settings
from edger1.train.fingerprint import fingerprint


def open_method(policy: LocalPolicy, settings: Settings) -> tuple[LogitDistill, Settings]:
    """Read the data that the settings name and find the teacher; return the method, and settings with sizes decided.

    The teacher is loaded when it is first asked. Raises what `sft.open_method` raises, UnknownModelError for a teacher
    that is none, UsageError where it has another tokenizer.
    """
    from edger1.folder import inspect
    from edger1.model import find

    distill: DistillSettings = tables.filled(
        DistillSettings, "distill", settings.tables.get("distill", {}), "the settings"
    )
    distill.check()
    folder = find(distill.teacher)
    inspect(folder)
    check_tokenizers(_tokenizer(folder), policy.tokenizer, distill.teacher)
    data, settings = sft.open_method(policy, settings)
    method = LogitDistill(
        data,
        _held_out(data, settings.train.evaluate_rows),
        distill,
        lambda: open_policy(folder, None, checkpointing=False),
        f"{fingerprint(folder)} exact",
        policy.vocabulary,
    )
    return method, settings


def _tokenizer(folder: Path) -> object:
    from mlx_lm.utils import load_tokenizer

    from edger1.errors import FormatError

    try:
        return load_tokenizer(folder)
    except Exception as error:
        raise FormatError(f"The tokenizer in {folder} cannot be read ({type(error).__name__}: {error}).") from error


def _held_out(data: sft.Sft, most: int) -> list[Batch]:
    """Return the batches that SFT measures on, up to a number of rows."""
    if data.held_out is None:
        return []
    found: list[Batch] = []
    for i in range(data.held_out.epoch_batches(0)):
        if sum(len(batch.ids) for batch in found) >= most:
            break
        found.append(data.held_out.at(i))
    return found
