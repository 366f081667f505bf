"""What a run leaves: the data set, every sample beside it, the figures, and a card for people.

    FOLDER/data.jsonl       kept answers as messages, reasoning within <think>...</think>
    FOLDER/samples.jsonl    every sample with its verdict, which `edger1 pairs` makes preference pairs of
    FOLDER/distill.json     teacher, settings, counts
    FOLDER/README.md        the card
    FOLDER/samples.sqlite   the cache of the teacher's answers

All but the last depend on the prompts, the settings and the teacher's answers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from edger1.errors import EdgeR1Error
from edger1.fetch.place import write_atomically
from edger1.train.distill.card import card
from edger1.train.distill.sampling import Sample, Sampled, Settings
from edger1.train.distill.teachers import texts

DATA, SAMPLES, FIGURES, CARD, CACHE = "data.jsonl", "samples.jsonl", "distill.json", "README.md", "samples.sqlite"


@dataclass(frozen=True)
class Lengths:
    """Of some answers, in tokens; in characters where a server did not count tokens of every one."""

    count: int
    mean: float
    median: float
    longest: int
    unit: str


@dataclass(frozen=True)
class Counts:
    """How many of what, from the prompts to the data set."""

    prompts_given: int
    prompts_bad: int
    prompts_repeated: int
    prompts_in_evaluation: int
    prompts: int
    samples_wanted: int
    samples: int
    unanswered: int
    cut_off: int
    wrong: int
    accepted: int
    without_reasoning: int
    """Accepted answers that have no reasoning."""
    kept: int
    reward_failures: int
    """Times that a reward failed on an answer, which counts as wrong."""
    prompts_without_answer: int
    """Prompts of which no sample was accepted."""
    lengths: dict[str, Lengths]
    """Of "accepted" and of "kept" answers, of all that were "sampled"."""

    @property
    def acceptance(self) -> float:
        """The share of samples that were accepted."""
        return self.accepted / self.samples if self.samples else 0.0


@dataclass(frozen=True)
class Report:
    """What a run came to."""

    folder: Path
    counts: Counts
    finished: bool
    unanswered: list[str]


@dataclass(frozen=True)
class Origin:
    """What a card says besides figures: where the prompts came from and how it was done."""

    prompts: str
    given: int
    bad: int
    repeated: int
    in_evaluation: int
    evaluation: tuple[str, ...]
    rewards: tuple[str, ...]
    """What verified; empty: nothing did."""
    command: str
    license: str | None = None
    reward_failures: int = 0
    """How often a reward failed on an answer, by a timeout for instance, and counted 0."""


def write(folder: Path, sampled: Sampled, settings: Settings, teacher: dict[str, Any], origin: Origin) -> Report:
    """Write all files of a run, each whole or not at all. Raises EdgeR1Error where they cannot be written."""
    counts = count(sampled, settings, origin)
    figures = {
        "teacher": teacher,
        "settings": asdict(settings),
        "verified_by": list(origin.rewards),
        "prompts": origin.prompts,
        "not_in": list(origin.evaluation),
        "finished": sampled.finished,
        "counts": asdict(counts),
        "acceptance": counts.acceptance,
        "unanswered": sampled.unanswered,
    }
    files = {
        DATA: _lines(_data(sampled)),
        SAMPLES: _lines(_samples(sampled)),
        FIGURES: json.dumps(figures, indent=1, ensure_ascii=False) + "\n",
        CARD: card(teacher, settings, counts, origin, finished=sampled.finished),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(folder / name, text)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise EdgeR1Error(f"{error.filename or folder} cannot be written: {reason}. The answers are kept.") from None
    return Report(folder, counts, sampled.finished, sampled.unanswered)


def count(sampled: Sampled, settings: Settings, origin: Origin) -> Counts:
    """Count what there is."""
    every = [sample for of in sampled.samples for sample in of]
    accepted = [sample for sample in every if sample.verdict.accepted]
    kept = [sample for sample in every if sample.kept]
    return Counts(
        prompts_given=origin.given,
        prompts_bad=origin.bad,
        prompts_repeated=origin.repeated,
        prompts_in_evaluation=origin.in_evaluation,
        prompts=len(sampled.questions),
        samples_wanted=len(sampled.questions) * settings.samples,
        samples=len(every),
        unanswered=len(sampled.unanswered),
        cut_off=sum(sample.verdict.why == "cut off" for sample in every),
        wrong=sum(sample.verdict.why == "wrong" for sample in every),
        accepted=len(accepted),
        without_reasoning=sum(not sample.reply.thinking for sample in accepted),
        kept=len(kept),
        reward_failures=origin.reward_failures,
        prompts_without_answer=sum(not any(s.verdict.accepted for s in of) for of in sampled.samples),
        lengths={name: _lengths(of) for name, of in (("sampled", every), ("accepted", accepted), ("kept", kept)) if of},
    )


def _lengths(samples: list[Sample]) -> Lengths:
    counted = all(sample.reply.tokens is not None for sample in samples)
    sizes = [(s.reply.tokens or 0) if counted else len(s.reply.text) for s in samples]
    return Lengths(len(sizes), mean(sizes), median(sizes), max(sizes), "tokens" if counted else "characters")


def _data(sampled: Sampled) -> Iterable[dict[str, Any]]:
    for question, of in zip(sampled.questions, sampled.samples, strict=True):
        for sample in of:
            if sample.kept:
                answer = {"role": "assistant", "content": sample.reply.text}
                yield {
                    "messages": [*texts(question.messages), answer],
                    "sample": sample.number,
                    "tokens": sample.reply.tokens,
                    "scores": sample.verdict.scores,
                    "source": question.where,
                }


def _samples(sampled: Sampled) -> Iterable[dict[str, Any]]:
    for number, (question, of) in enumerate(zip(sampled.questions, sampled.samples, strict=True)):
        for sample in of:
            yield {
                "prompt": number,
                "sample": sample.number,
                "messages": texts(question.messages),
                "text": sample.reply.text,
                "tokens": sample.reply.tokens,
                "finish": sample.reply.finish,
                "accepted": sample.verdict.accepted,
                "why": sample.verdict.why,
                "scores": sample.verdict.scores,
                "kept": sample.kept,
                "source": question.where,
            }


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    # Lone surrogates, which a server may send, survive as escapes alone.
    return "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in rows)
