"""GRPO opened from a run's settings: prompts read from the data, rewards by name, room for the caches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edger1.errors import FormatError, UsageError
from edger1.train import tables
from edger1.train.datasets.reading import read
from edger1.train.datasets.rows import Row
from edger1.train.datasets.splitting import deduplicate, split
from edger1.train.finetune import decoding, plan
from edger1.train.finetune.grpo import Grpo
from edger1.train.finetune.grpo_settings import BATCH_TOKENS, GrpoSettings, RewardSettings
from edger1.train.finetune.policy import LocalPolicy
from edger1.train.finetune.rollouts import Prompt, make_prompt
from edger1.train.finetune.settings import Settings
from edger1.train.rewards.completion import split_thought
from edger1.train.rewards.opening import open_rewards
from edger1.units import format_bytes


def open_method(policy: LocalPolicy, settings: Settings) -> tuple[Grpo, Settings]:
    """Read the prompts that the settings name and open the rewards; return the method, and settings with steps decided.

    Raises what reading raises, UsageError for rewards that are none, FormatError where no prompt is short enough.
    """
    data, train = settings.data, settings.train
    grpo: GrpoSettings = tables.filled(GrpoSettings, "grpo", settings.tables.get("grpo", {}), "the settings")
    reward: RewardSettings = tables.filled(
        RewardSettings, "rewards", settings.tables.get("rewards", {}), "the settings"
    )
    if not reward.use:
        raise UsageError('GRPO learns from rewards, and [rewards] use is empty; give some, such as use = ["maths"].')
    if policy.adapted is not None and policy.adapted.spec.dropout:
        raise UsageError(
            "The adapter has a dropout: what it samples would be another policy than what is trained. Set [adapter] "
            "dropout to 0."
        )
    dataset = read(data.path, kind=data.kind or None, skip_bad=data.skip_bad)
    rows = list(dataset.rows)
    lines = [f"{data.path}: {len(rows):,} rows of kind {dataset.kind}"]
    if dataset.bad_count:
        lines.append(f"{dataset.bad_count:,} bad rows are left out; the first: {dataset.bad[0].where}")
    if data.deduplicate:
        rows, dropped = deduplicate(rows)
        if dropped:
            lines.append(f"{len(dropped):,} rows repeat an earlier one and are left out")
    if data.validation:
        held_out = list(read(data.validation, kind=data.kind or None, skip_bad=data.skip_bad).rows)
    else:
        rows, held_out = split(rows, data.validation_share, train.seed) if data.validation_share else (rows, [])
    most = (data.length or policy.folder.context_length or 2**31) - grpo.max_tokens
    prompts = _prompts(rows, policy.tokenizer, most, lines)
    if not prompts:
        raise FormatError(
            f"{data.path} has no prompt that leaves room for an answer of {grpo.max_tokens:,} tokens; lower [grpo] "
            "max_tokens or give shorter prompts."
        )
    settings, grpo = _fitted(policy, settings, grpo, max(len(prompt.ids) for prompt in prompts), lines)
    rewards = open_rewards(reward.use, timeout_s=reward.timeout_s, on_error=reward.on_error, folder=Path.cwd())
    method = Grpo(
        prompts,
        rewards,
        grpo,
        policy.tokenizer,
        seed=train.seed,
        held_out=_prompts(held_out, policy.tokenizer, most, []),
        lines=lines,
    )
    if not train.steps:
        samplings = math.ceil(train.epochs * len(prompts) / grpo.prompts)
        settings = settings.with_values("train", steps=max(1, samplings) * grpo.updates)
    return method, settings


def _fitted(
    policy: LocalPolicy, settings: Settings, grpo: GrpoSettings, longest: int, lines: list[str]
) -> tuple[Settings, GrpoSettings]:
    """Decide how much passes the model together, and the room for caches, where the settings leave that open.

    `longest` is the longest prompt's tokens. Raises MemoryCeilingError where not even one completion fits.
    """
    found, ceiling = plan.anatomy(policy), plan.ceiling(settings.train.memory)
    longest += grpo.max_tokens
    tokens = max(longest, grpo.batch_tokens or BATCH_TOKENS)
    while not grpo.batch_tokens and tokens > longest and plan.memory(found, 1, tokens).total > ceiling:
        tokens = max(longest, tokens // 2)
    plan.check(found, 1, tokens, ceiling)
    needed = plan.memory(found, 1, tokens)
    merged = 0 if policy.adapted is None else decoding.merged_bytes(policy.adapted)
    room = grpo.cache_bytes or max(1, ceiling - needed.weights - needed.adapter - needed.process - merged)
    grpo = replace(grpo, batch_tokens=tokens, cache_bytes=room)
    lines.append(f"memory about {needed}, or caches of up to {format_bytes(room)}; ceiling {format_bytes(ceiling)}")
    return settings.with_values("grpo", batch_tokens=tokens, cache_bytes=room), grpo


def _prompts(rows: Sequence[Row], tokenizer: Any, most: int, lines: list[str]) -> list[Prompt]:
    """Return the rows as prompts of up to `most` tokens; whole, or not at all."""
    found = [_prompt(row, tokenizer) for row in rows]
    fitting = [prompt for prompt in found if len(prompt.ids) <= most]
    if len(fitting) < len(found):
        lines.append(f"{len(found) - len(fitting):,} prompts of more than {most:,} tokens are left out")
    return fitting


def _prompt(row: Row, tokenizer: Any) -> Prompt:
    """Return a row's prompt; where a conversation ends with an answer, that becomes the column "answer"."""
    columns = dict(row.columns)
    if row.messages is None:
        return make_prompt(row.where, row.text or "", columns, tokenizer)
    messages = row.messages
    if messages and messages[-1].get("role") == "assistant":
        columns.setdefault("answer", split_thought(str(messages[-1].get("content", "")))[1])
        messages = messages[:-1]
    return make_prompt(row.where, messages, columns, tokenizer)
