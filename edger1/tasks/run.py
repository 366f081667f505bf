"""A task put to several models one after the other, each loaded once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path

from edger1.errors import UsageError
from edger1.tasks.asking import Asked, Sample, Settings, ask
from edger1.tasks.results import (
    Evaluation,
    Result,
    Scored,
    completion_of,
    default_ks,
    order,
    transcript,
)
from edger1.tasks.store import Store, identity
from edger1.tasks.task import Task


@dataclass(frozen=True)
class Variant:
    """A model, with or without an adapter."""

    name: str
    folder: Path
    adapter: Path | None = None


Open = Callable[[Variant], AbstractContextManager[Asked]]
OnSample = Callable[[Variant, int, int, float], None]
"""Called with the variant, the samples done, all its samples, and the share that is right so far."""


def evaluate(
    task: Task,
    variants: Sequence[Variant],
    settings: Settings,
    open_model: Open,
    *,
    precision: str = "fast",
    ks: Sequence[int] = (),
    resume: bool = False,
    keep: Path | None = None,
    on_sample: OnSample = lambda variant, done, total, right: None,
) -> Evaluation:
    """Ask every variant the task's questions and score the answers.

    Samples are kept as they come. After an interruption, `resume` takes those of the same models, questions and
    settings, and goes on; they are deleted when everything is done. keep: a JSONL file for transcripts. ks: for pass@k
    and maj@k, by default the powers of two up to the samples.

    Raises UsageError for settings that make no sense, and what the model and the rewards raise.
    """
    settings.check()
    chosen = tuple(ks) or default_ks(settings.samples)
    if bad := [k for k in chosen if not 1 <= k <= settings.samples]:
        raise UsageError(f"k is {bad[0]}, and there are {settings.samples} samples a question; expected 1 to as many.")
    results = []
    stores = []
    with ExitStack() as closing:
        for variant in variants:
            store = Store(identity(variant.folder, variant.adapter, precision, task.questions, settings), resume=resume)
            closing.callback(store.close, keep=True)
            stores.append(store)
            results.append(_one(task, variant, settings, open_model, store, chosen, on_sample))
        if keep is not None:
            _write_transcripts(keep, task, results)
    for store in stores:
        store.close(keep=False)
    return Evaluation(task.name, len(task.questions), settings, precision, results, list(task.reward.failures))


def _one(
    task: Task,
    variant: Variant,
    settings: Settings,
    open_model: Open,
    store: Store,
    ks: tuple[int, ...],
    on_sample: OnSample,
) -> Result:
    total = len(task.questions) * settings.samples
    scored: list[Scored] = []
    right = 0

    def score(sample: Sample) -> None:
        nonlocal right
        scored.append(_score(task, sample))
        right += scored[-1].right
        on_sample(variant, len(scored), total, right / len(scored))

    for (_, number), sample in sorted(store.samples.items()):
        if number < settings.samples:
            score(sample)
    tokens, seconds = 0, 0.0
    if len(scored) < total:
        with open_model(variant) as model:
            begin = time.monotonic()
            for sample in ask(model, task.questions, settings, done=store.has):
                store.add(sample)
                tokens += sample.tokens
                score(sample)
            seconds = time.monotonic() - begin
    return Result(variant.name, order(scored, len(task.questions)), ks, seconds, tokens)


def _score(task: Task, sample: Sample) -> Scored:
    (values,) = task.reward.score([completion_of(task.questions[sample.question], sample)])
    return Scored(sample, values, task.reward.total(values), task.reward.right(values))


def _write_transcripts(path: Path, task: Task, results: Sequence[Result]) -> None:
    from edger1.fetch.place import write_atomically

    lines = [
        json.dumps(transcript(result.name, task.questions[each.sample.question], each), ensure_ascii=False, default=str)
        for result in results
        for each in result.flat
    ]
    try:
        write_atomically(path, "\n".join(lines) + "\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None
