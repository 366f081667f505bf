"""Supervised fine-tuning: the model learns to say what the data's assistants said.

The loss of a step is the mean cross entropy of its counted tokens, in nats: every assistant turn's, reasoning included,
or all of a plain text's. It is divided by the count of the whole step, so that how a step is split into batches changes
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.errors import FormatError
from edger1.train.datasets.packing import Batches
from edger1.train.datasets.reading import read
from edger1.train.datasets.rows import Dataset, Row
from edger1.train.datasets.splitting import deduplicate, split
from edger1.train.datasets.statistics import describe
from edger1.train.datasets.template import Encoded, Template
from edger1.train.finetune import plan
from edger1.train.finetune.method import Batch, Evaluation, Policy, Sample, Step
from edger1.train.finetune.policy import LocalPolicy
from edger1.train.finetune.sampling import answer
from edger1.train.finetune.settings import Settings

LONGEST = 2048
"""Tokens of a document at most, where no length is given."""
_TOGETHER = 2048
"""Tokens that pass the model together: enough for the kernels to be as fast as they get."""
_STEP_TOKENS = (512, 8192)
"""Tokens of a step where it is not given: a hundredth of all that is seen, between these."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of the validation data, to be answered as a sample."""

    text: str
    ids: np.ndarray


class Sft:
    """The method; see `method.Method`."""

    name = "sft"

    def __init__(
        self,
        training: Sequence[Encoded],
        validation: Sequence[Encoded],
        settings: Settings,
        *,
        pad: int = 0,
        packed: bool = True,
        prompts: Sequence[Prompt] = (),
        lines: Sequence[str] = (),
    ) -> None:
        """Take documents, and settings with rows, accumulation and length decided."""
        train, length = settings.train, settings.data.length
        self.settings, self._prompts, self._lines = settings, prompts, list(lines)
        self.batches = Batches(list(training), length, train.rows, train.seed, pad=pad, packed=packed)
        self.held_out = (
            Batches(list(validation), length, train.rows, 0, pad=pad, packed=packed, shuffle=False)
            if validation
            else None
        )

    def describe(self) -> list[str]:
        """Return the plan's lines about the data."""
        return self._lines

    def step(self, policy: Policy, step: int) -> Step:
        """Return the batches of a step, each weight divided by the step's count."""
        each = self.settings.train.accumulate
        return normalised([self.batches.at(i) for i in range(step * each, (step + 1) * each)])

    def loss(self, policy: Policy, batch: Batch) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the batch's part of the step's mean cross entropy, in nats."""
        return -(policy.logprobs(batch) * mx.array(batch.weights)).sum(), {}

    def evaluate(self, policy: Policy, step: int) -> Evaluation | None:
        """Return the mean cross entropy of held-out documents, and answers to some of their prompts."""
        if self.held_out is None:
            return None
        total, count, rows = 0.0, 0.0, 0
        for i in range(self.held_out.epoch_batches(0)):
            if rows >= self.settings.train.evaluate_rows:
                break
            batch = self.held_out.at(i)
            found = np.array(policy.logprobs(batch))
            total -= float((found * batch.weights).sum(dtype=np.float64))
            count += float(batch.weights.sum())
            rows += len(batch.ids)
        loss = total / max(1.0, count)
        return Evaluation({"loss": loss, "perplexity": math.exp(min(loss, 50.0))}, -loss, self._answers(policy))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return nothing: batches depend on the step alone."""
        return {}, {}

    def restore(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        """Take up nothing."""

    def _answers(self, policy: Policy) -> list[Sample]:
        limit = self.settings.train.sample_tokens
        return [Sample(prompt.text, answer(policy, prompt.ids, limit)) for prompt in self._prompts]


def normalised(batches: Sequence[Batch]) -> Step:
    """Return a step of batches whose weights, 1 where a token counts, are divided by how many do."""
    count = float(sum(batch.weights.sum(dtype=np.float64) for batch in batches))
    divided = [replace(batch, weights=batch.weights / np.float32(max(1.0, count))) for batch in batches]
    return Step(divided, int(count))


def open_method(policy: LocalPolicy, settings: Settings) -> tuple[Sft, Settings]:
    """Read the data that the settings name; return the method, and settings with sizes decided.

    Raises what reading and encoding raise, and MemoryCeilingError where a batch does not fit.
    """
    data, train = settings.data, settings.train
    dataset = read(data.path, kind=data.kind or None, skip_bad=data.skip_bad)
    rows, lines = _unrepeated(dataset, settings)
    lines += _bad_lines(dataset)
    if data.validation:
        held_out = list(read(data.validation, kind=data.kind or None, skip_bad=data.skip_bad).rows)
    else:
        rows, held_out = split(rows, data.validation_share, train.seed) if data.validation_share else (rows, [])
    template = Template(
        policy.tokenizer, data.length or longest(policy), reasoning=data.reasoning, cut_prompt=data.cut_prompt
    )
    encoding = template.encode_all(rows)
    documents = encoding.documents
    validation = _encoded(template, held_out)
    lines += describe(rows, encoding).lines() + encoding.lines()
    lines.append(f"{len(documents):,} documents to learn from, {len(validation):,} to measure on")
    packed = data.pack and policy.packs
    settings = sized(policy, settings, [*documents, *validation], packed=packed)
    prompts = _prompts(template, held_out, train.samples)
    method = Sft(documents, validation, settings, pad=template.pad, packed=packed, prompts=prompts, lines=lines)
    if not train.steps:
        batches = sum(method.batches.epoch_batches(epoch) for epoch in range(math.ceil(train.epochs)))
        share = train.epochs / math.ceil(train.epochs)
        settings = settings.with_values("train", steps=max(1, math.ceil(batches * share / settings.train.accumulate)))
    return method, settings


def longest(policy: LocalPolicy) -> int:
    """Return how long documents may be where nobody says: LONGEST, or what the model was trained for."""
    return min(LONGEST, policy.folder.context_length or LONGEST)


def sized(policy: LocalPolicy, settings: Settings, documents: Sequence[Encoded], *, packed: bool) -> Settings:
    """Decide length, rows and accumulation where the settings leave them open. Raises MemoryCeilingError."""
    data, train = settings.data, settings.train
    top = max(len(document) for document in documents)
    length = data.length or (top + 31) // 32 * 32
    seen = train.epochs * sum(len(document) for document in documents)
    step_tokens = min(max(seen / 100, _STEP_TOKENS[0]), _STEP_TOKENS[1])
    found, ceiling = plan.anatomy(policy), plan.ceiling(train.memory)
    if train.rows:
        rows = train.rows
        plan.check(found, rows, length, ceiling)
    else:
        each = length if packed else seen / train.epochs / len(documents)
        rows = plan.choose_rows(found, length, round(min(_TOGETHER, step_tokens) / each), ceiling)
    accumulate = train.accumulate or max(1, round(step_tokens / (rows * length)))
    return settings.with_values("data", length=length).with_values("train", rows=rows, accumulate=accumulate)


def _unrepeated(dataset: Dataset, settings: Settings) -> tuple[list[Row], list[str]]:
    rows = list(dataset.rows)
    fields = f" from {', '.join(dataset.fields)}" if dataset.fields else ""
    lines = [f"{settings.data.path}: {len(rows):,} rows of kind {dataset.kind}{fields}"]
    if settings.data.deduplicate:
        rows, dropped = deduplicate(rows)
        if dropped:
            lines.append(f"{len(dropped):,} rows repeat an earlier one and are left out")
    return rows, lines


def _bad_lines(dataset: Dataset) -> list[str]:
    if not dataset.bad_count:
        return []
    return [f"{dataset.bad_count:,} bad rows are left out; the first:"] + [
        f"  {bad.where}: {bad.reason}" for bad in dataset.bad[:3]
    ]


def _encoded(template: Template, rows: Sequence[Row]) -> list[Encoded]:
    try:
        return template.encode_all(rows).documents if rows else []
    except FormatError:
        # A handful of rows may well hold nothing to measure on.
        return []


def _prompts(template: Template, rows: Sequence[Row], count: int) -> list[Prompt]:
    """Return the first prompts that end where an assistant answers."""
    found: list[Prompt] = []
    for row in rows:
        if len(found) == count:
            break
        turns = row.messages or []
        last = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "assistant"), 0)
        if last and turns[last - 1]["role"] == "user":
            ids = template.prompt(turns[:last])
            if len(ids) < template.length:
                found.append(Prompt(str(turns[last - 1]["content"]), ids))
    return found
