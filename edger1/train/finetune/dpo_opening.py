"""DPO opened from a run's settings: preference rows read, encoded and split, rows sized by memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from edger1.errors import FormatError, UsageError
from edger1.train import tables
from edger1.train.datasets.reading import read
from edger1.train.datasets.rows import Row
from edger1.train.datasets.splitting import split
from edger1.train.datasets.template import Template
from edger1.train.finetune import plan, sft
from edger1.train.finetune.dpo import Arrangement, Dpo
from edger1.train.finetune.dpo_settings import DpoSettings
from edger1.train.finetune.pairs import Pairs, encode_pairs
from edger1.train.finetune.policy import LocalPolicy
from edger1.train.finetune.settings import Settings
from edger1.train.fingerprint import fingerprint


def open_method(policy: LocalPolicy, settings: Settings) -> tuple[Dpo, Settings]:
    """Read the pairs that the settings name; return the method, and settings with sizes decided.

    `[data] length` is what one half of a pair may have; a row holds both. Raises what reading raises, UsageError for
    data of another kind, FormatError where no pair is left, MemoryCeilingError where a pair does not fit.
    """
    data, train = settings.data, settings.train
    dpo: DpoSettings = tables.filled(DpoSettings, "dpo", settings.tables.get("dpo", {}), "the settings")
    dpo.check()
    rows, lines = _preferences(data.path, settings)
    if data.validation:
        held_out, _ = _preferences(data.validation, settings)
    else:
        rows, held_out = split(rows, data.validation_share, train.seed) if data.validation_share else (rows, [])
    template = Template(
        policy.tokenizer, data.length or sft.longest(policy), reasoning=data.reasoning, cut_prompt=data.cut_prompt
    )
    pairs = encode_pairs(rows, template)
    measured = _measured(held_out, template, train.evaluate_rows)
    width = max(pair.tokens for pair in [*pairs.pairs, *(measured.pairs if measured else [])])
    found, ceiling = plan.anatomy(policy), plan.ceiling(train.memory)
    if train.rows:
        plan.check(found, train.rows, width, ceiling)
    count = train.rows or plan.choose_rows(found, width, 1, ceiling)
    steps = train.steps or max(1, math.ceil(train.epochs * len(pairs.pairs) / dpo.pairs))
    longest = max(len(half.ids) for pair in pairs.pairs for half in (pair.chosen, pair.rejected))
    settings = settings.with_values("data", length=data.length or longest)
    settings = settings.with_values("train", rows=count, steps=steps)
    return Dpo(
        pairs,
        measured,
        dpo,
        Arrangement(width, count, train.seed),
        f"{fingerprint(policy.folder.path)} exact",
        pad=template.pad,
        lines=lines,
    ), settings


def _preferences(path: str, settings: Settings) -> tuple[list[Row], list[str]]:
    data = settings.data
    dataset = read(path, kind=data.kind or None, skip_bad=data.skip_bad)
    if dataset.kind != "preference":
        raise UsageError(
            f"{path} has rows of kind {dataset.kind}; DPO learns from pairs: rows with prompt, chosen and rejected. "
            "edger1 pairs makes some from judged answers."
        )
    lines = [f"{path}: {len(dataset.rows):,} rows of kind preference"]
    if dataset.bad_count:
        bad = dataset.bad[0]
        lines.append(f"{dataset.bad_count:,} bad rows are left out; the first: {bad.where}: {bad.reason}")
    return list(dataset.rows), lines


def _measured(rows: Sequence[Row], template: Template, most: int) -> Pairs | None:
    """Return the first pairs to measure on; a handful of rows may well hold none."""
    try:
        found = encode_pairs(rows, template) if rows else None
    except FormatError:
        return None
    return None if found is None else replace(found, pairs=found.pairs[:most])
