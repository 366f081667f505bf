"""A task's questions put to a model: several at once, each sample with a seed of its own.

A sample depends on the model, the question, its number and the settings, and on nothing else: not on what else runs at
the same time, nor on where a run was stopped and went on.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from edger1.errors import ContextError, UsageError
from edger1.tasks.task import Question


@dataclass(frozen=True)
class Settings:
    """How answers are sampled."""

    samples: int = 1
    """A question."""
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    seed: int = 0
    think: str = "auto"
    at_once: int = 16
    """Samples under way together; up to 16, CPU kernels compute each as if it were alone."""

    def check(self) -> None:
        """Raise UsageError for settings that make no sense."""
        from edger1 import sampling
        from edger1.messages import Sampling

        for name in ("samples", "max_tokens", "at_once"):
            sampling.check_count(name, getattr(self, name))
        sampling.check(Sampling(temperature=self.temperature, top_p=self.top_p, seed=self.seed))
        if self.temperature == 0 and self.samples > 1:
            raise UsageError(
                f"{self.samples} samples a question at temperature 0 are the same one; give --temperature, such as 0.6."
            )

    def identity(self) -> dict[str, Any]:
        """Return what a sample depends on, as plain values."""
        return {name: value for name, value in asdict(self).items() if name not in ("samples", "at_once")}


@dataclass(frozen=True)
class Sample:
    """One answer of a model to one question."""

    question: int
    number: int
    """Of the question's samples, from 0."""
    thinking: str
    answer: str
    tokens: int
    finished: bool
    """Whether it ended by itself, rather than at the limit on tokens."""


class Asked(Protocol):
    """What `edger1.load` gives, as far as it is needed here."""

    info: dict[str, Any]

    @property
    def submit(self) -> Callable[..., Any]:
        """Start an answer; the handle's `result()` waits for it."""


def seed_of(seed: int, question: int, number: int) -> int:
    """Return the seed of one sample; equal for all models, so that they are compared on equal draws."""
    digest = hashlib.sha256(f"{seed}/{question}/{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def ask(
    model: Asked,
    questions: Sequence[Question],
    settings: Settings,
    *,
    done: Callable[[int, int], bool] = lambda question, number: False,
) -> Iterator[Sample]:
    """Yield the samples that are not `done`, as they are complete, in the order of the questions.

    Leaving early cancels what is under way. Raises ContextError that names a question which does not fit.
    """
    wanted = deque(
        (question, number)
        for question in range(len(questions))
        for number in range(settings.samples)
        if not done(question, number)
    )
    under_way: deque[tuple[int, int, Any]] = deque()
    try:
        while wanted or under_way:
            while wanted and len(under_way) < settings.at_once:
                question, number = wanted.popleft()
                handle = model.submit(
                    **_prompt(model, questions[question].messages),
                    max_tokens=settings.max_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    top_k=0,
                    min_p=0.0,
                    repetition_penalty=1.0,
                    seed=seed_of(settings.seed, question, number),
                    think=settings.think,
                )
                under_way.append((question, number, handle))
            question, number, handle = _next(under_way)
            try:
                said = handle.result()
            except ContextError as error:
                raise ContextError(f"{questions[question].where}: {error}") from None
            yield Sample(
                question, number, said.thinking, said.text, said.usage.completion_tokens, said.finish_reason == "stop"
            )
    finally:
        for _, _, handle in under_way:
            handle.cancel()


def _prompt(model: Asked, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a question as the model takes it: a model without a chat template continues its text."""
    if model.info["has_chat_template"]:
        return {"prompt": messages}
    return {"prompt": "\n\n".join(str(message["content"]) for message in messages) + "\n", "raw": True}


def _next(under_way: deque[tuple[int, int, Any]]) -> tuple[int, int, Any]:
    """Take one that is complete, else the oldest."""
    for place, (_, _, handle) in enumerate(under_way):
        if handle.done:
            taken = under_way[place]
            del under_way[place]
            return taken
    return under_way.popleft()
