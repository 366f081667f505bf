"""What came of asking one or several models the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from edger1.final_answers import vote_key
from edger1.tasks.asking import Sample, Settings
from edger1.tasks.estimates import Difference, Estimate, difference, maj_at_k, mean, pass_at_k
from edger1.tasks.task import Question
from edger1.train.rewards.completion import Completion


@dataclass(frozen=True)
class Scored:
    """A sample and what its rewards gave."""

    sample: Sample
    rewards: dict[str, float]
    total: float
    right: bool


@dataclass(frozen=True)
class Result:
    """One model's answers to a task's questions."""

    name: str
    scored: list[list[Scored]]
    """For each question its samples, in the order of their numbers."""
    ks: tuple[int, ...]
    seconds: float
    """That the sampling took; of what was taken from an earlier run nothing is counted."""
    tokens_sampled: int
    """In that time."""
    shares: list[float] = field(init=False)
    """For each question, the share of its samples that are right."""
    accuracy: Estimate = field(init=False)
    pass_at: dict[int, Estimate] = field(init=False)
    maj_at: dict[int, Estimate] = field(init=False)
    """Without k of 1 and 2, where it is the accuracy."""

    def __post_init__(self) -> None:
        shares = [sum(each.right for each in of) / len(of) for of in self.scored]
        keys = [[vote_key(each.sample.answer) for each in of] for of in self.scored]
        right = [[each.right for each in of] for of in self.scored]
        passed = {k: mean([pass_at_k(len(of), sum(of), k) for of in right]) for k in self.ks}
        voted = {k: mean([maj_at_k(*pair, k) for pair in zip(keys, right, strict=True)]) for k in self.ks if k > 2}
        for name, value in (("shares", shares), ("accuracy", mean(shares)), ("pass_at", passed), ("maj_at", voted)):
            object.__setattr__(self, name, value)

    @property
    def flat(self) -> list[Scored]:
        """All samples."""
        return [each for of in self.scored for each in of]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a sample, on average."""
        return sum(each.sample.tokens for each in self.flat) / len(self.flat)

    @property
    def finished(self) -> float:
        """The share of samples that ended by themselves."""
        return sum(each.sample.finished for each in self.flat) / len(self.flat)

    def rewards(self) -> dict[str, float]:
        """Return the mean of every reward."""
        flat = self.flat
        return {name: sum(each.rewards[name] for each in flat) / len(flat) for name in flat[0].rewards}

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain values, without the samples."""
        return {
            "name": self.name,
            "accuracy": asdict(self.accuracy),
            "pass_at": {str(k): asdict(estimate) for k, estimate in self.pass_at.items()},
            "maj_at": {str(k): asdict(estimate) for k, estimate in self.maj_at.items()},
            "rewards": self.rewards(),
            "mean_tokens": self.mean_tokens,
            "finished": self.finished,
            "shares": self.shares,
            "seconds": self.seconds,
            "tokens_sampled": self.tokens_sampled,
        }


@dataclass(frozen=True)
class Evaluation:
    """Several models on one task; the first is what the others are compared with."""

    task: str
    questions: int
    settings: Settings
    precision: str
    results: list[Result]
    failures: list[str] = field(default_factory=list)
    """Rewards that raised or took too long and were counted as 0."""

    def differences(self) -> dict[str, Difference]:
        """Compare each model after the first with the first."""
        first, *others = self.results
        return {other.name: difference(other.shares, first.shares) for other in others}

    def as_json(self) -> dict[str, Any]:
        """Return everything but the samples as plain values."""
        return {
            "task": self.task,
            "questions": self.questions,
            "settings": asdict(self.settings),
            "precision": self.precision,
            "results": [result.as_json() for result in self.results],
            "differences": {name: asdict(found) for name, found in self.differences().items()},
            "failures": self.failures,
        }


def default_ks(samples: int) -> tuple[int, ...]:
    """Return the k that pass@k and maj@k are given for: powers of two above 1 up to the samples, and the samples."""
    powers = {2**i for i in range(1, samples.bit_length()) if 2**i <= samples}
    return tuple(sorted(powers | ({samples} if samples > 1 else set())))


def completion_of(question: Question, sample: Sample) -> Completion:
    """Return a sample as rewards see it."""
    text = sample.answer
    if sample.thinking:
        # A thought that the limit cut off has no end, and no answer after it.
        open_end = not sample.finished and not sample.answer
        text = f"<think>\n{sample.thinking.strip()}" + ("" if open_end else f"\n</think>\n\n{sample.answer}")
    return Completion.from_text(
        question.messages,
        text,
        columns=question.columns,
        tokens=sample.tokens,
        finished=sample.finished,
        where=question.where,
    )


def transcript(result: str, question: Question, scored: Scored) -> dict[str, Any]:
    """Return a sample with its question and rewards as plain values, for a file of transcripts."""
    return {
        "model": result,
        "where": question.where,
        "messages": question.messages,
        "number": scored.sample.number,
        "thinking": scored.sample.thinking,
        "answer": scored.sample.answer,
        "expected": question.columns.get("answer"),
        "right": scored.right,
        "rewards": scored.rewards,
        "total": scored.total,
        "tokens": scored.sample.tokens,
        "finished": scored.sample.finished,
    }


def order(scored: Sequence[Scored], questions: int) -> list[list[Scored]]:
    """Return samples by question, each question's in the order of their numbers."""
    by_question: list[list[Scored]] = [[] for _ in range(questions)]
    for each in sorted(scored, key=lambda each: each.sample.number):
        by_question[each.sample.question].append(each)
    return by_question
