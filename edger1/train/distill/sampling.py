"""Distillation of reasoning: n answers a prompt from a teacher, those a verifier accepts, the shortest of them.

For each prompt: sample n answers; drop those that were cut off and those that a reward calls wrong (rejection sampling,
as Sky-T1 and DeepSeek-R1's distilled models were taught); of the rest keep the `keep` shortest. What is asked for is
looked up first in a cache keyed by teacher, prompt, settings, seed and the number of the sample: a run that was killed
goes on where it was and ends with the same files, and one with larger n asks only for what is new.

Not here: training on the result, which is SFT like any other.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from edger1.errors import UsageError
from edger1.tasks.task import Question
from edger1.train.distill.teachers import Drawing, NoAnswerError, Reply, StoppedError, Teacher, TeacherError, texts
from edger1.train.distill.verifying import Verdict, Verifier
from edger1.train.store import Store, key_of

FAILURES_IN_A_ROW = 10
_LOOK_S = 0.2


@dataclass(frozen=True)
class Settings:
    """What is sampled and what of it is kept."""

    samples: int = 4
    """Answers a prompt."""
    keep: int | None = 1
    """How many of a prompt's accepted answers are kept, shortest first (Sky-T1-Flash: of 8 the shortest); None: all."""
    drawing: Drawing = field(default_factory=Drawing)
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for a number out of range."""
        if self.samples < 1:
            raise UsageError(f"-n is {self.samples}; expected at least 1 sample a prompt.")
        if self.keep is not None and self.keep < 1:
            raise UsageError(f"--keep is {self.keep}; expected at least 1 answer a prompt.")


@dataclass(frozen=True)
class Sample:
    """One answer to one prompt, judged."""

    number: int
    reply: Reply
    verdict: Verdict
    kept: bool = False
    """Whether it is in the data set: accepted, among the shortest, and no copy of another one kept."""


@dataclass(frozen=True)
class Progress:
    """How far a run is, in samples."""

    done: int
    total: int
    cached: int
    accepted: int
    unanswered: int
    seconds_left: float | None

    @property
    def acceptance(self) -> float | None:
        """The share of the answers that were accepted."""
        answered = self.done - self.unanswered
        return self.accepted / answered if answered else None


@dataclass
class Sampled:
    """All there is of a run: the samples of each prompt by number, and what the teacher did not answer."""

    questions: list[Question]
    samples: list[list[Sample]]
    unanswered: list[str]
    """Where, which sample and why."""
    finished: bool
    """Whether every sample was asked for."""


def distinct(questions: Sequence[Question]) -> tuple[list[Question], int]:
    """Return the questions without repetitions, and how many repetitions there were."""
    seen: dict[str, Question] = {}
    for question in questions:
        seen.setdefault(key_of(texts(question.messages)), question)
    return list(seen.values()), len(questions) - len(seen)


class Sampling:
    """One run over distinct questions. `run` is called from the thread that opened the store."""

    def __init__(
        self, settings: Settings, teacher: Teacher, verifier: Verifier, questions: list[Question], store: Store
    ) -> None:
        settings.check()
        self._settings = settings
        self._teacher = teacher
        self._verifier = verifier
        self._questions = questions
        self._store = store
        self._samples: list[dict[int, Sample]] = [{} for _ in questions]
        self._unanswered: dict[tuple[int, int], str] = {}
        self._accepted = self._cached = self._asked = 0
        self._began = time.monotonic()

    def run(self, on_progress: Callable[[Progress], None], stop: Callable[[], bool]) -> Sampled:
        """Sample until all is there, or until `stop` says so; what was answered by then is in the store.

        Raises TeacherError where the teacher cannot be used, or ten prompts in a row were not answered; RewardError
        where a reward fails. Answers are in the store then, too.
        """
        missing = self._look_up(on_progress, stop)
        finished = missing is not None and self._ask_for(missing, on_progress, stop)
        found = [[of[i] for i in sorted(of)] for of in self._samples]
        unanswered = [self._unanswered[at] for at in sorted(self._unanswered)]
        return Sampled(self._questions, [choose(of, self._settings.keep) for of in found], unanswered, finished)

    def _look_up(
        self, on_progress: Callable[[Progress], None], stop: Callable[[], bool]
    ) -> deque[tuple[int, int]] | None:
        """Judge what the store has, and return what it has not; None where stopped."""
        missing: deque[tuple[int, int]] = deque()
        for i in range(len(self._questions)):
            for number in range(self._settings.samples):
                if stop():
                    return None
                kept = self._store.get(self._key(i, number))
                if kept is None:
                    missing.append((i, number))
                    continue
                self._cached += 1
                self._judge(i, number, Reply.from_bytes(kept))
                on_progress(self._progress())
        return missing

    def _ask_for(
        self, missing: deque[tuple[int, int]], on_progress: Callable[[Progress], None], stop: Callable[[], bool]
    ) -> bool:
        """Ask the teacher; return whether all was asked for."""
        pool = ThreadPoolExecutor(self._teacher.concurrency, thread_name_prefix="teacher")
        under_way: dict[Future[Reply], tuple[int, int]] = {}
        in_a_row = 0
        self._began = time.monotonic()
        try:
            while (missing or under_way) and not stop():
                while missing and len(under_way) < self._teacher.concurrency:
                    at = missing.popleft()
                    if (kept := self._store.get(self._key(*at))) is not None:
                        # Another process on the same store was faster.
                        self._take(at, Reply.from_bytes(kept))
                        continue
                    under_way[pool.submit(self._ask, *at)] = at
                done, _ = wait(under_way, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=under_way.__getitem__):
                    at = under_way.pop(future)
                    try:
                        kept = self._store.add(self._key(*at), future.result().to_bytes())
                    except NoAnswerError as error:
                        in_a_row += 1
                        self._unanswered[at] = f"{self._questions[at[0]].where}, sample {at[1]}: {error}"
                        if in_a_row >= FAILURES_IN_A_ROW:
                            raise TeacherError(
                                f"{self._teacher.name} left {in_a_row} prompts in a row unanswered. {error} "
                                "What it has answered is kept; run the same command again to go on."
                            ) from None
                    else:
                        in_a_row = 0
                        self._take(at, Reply.from_bytes(kept))
                    on_progress(self._progress())
            return not missing and not under_way
        except StoppedError:
            return False
        finally:
            if under_way or missing:
                self._teacher.stop()
            pool.shutdown(wait=False, cancel_futures=True)

    def _ask(self, i: int, number: int) -> Reply:
        seed = int(self._key(i, number)[:7], 16)
        return self._teacher.ask(texts(self._questions[i].messages), self._settings.drawing, seed)

    def _take(self, at: tuple[int, int], reply: Reply) -> None:
        self._asked += 1
        self._judge(*at, reply)

    def _judge(self, i: int, number: int, reply: Reply) -> None:
        verdict = self._verifier.judge(self._questions[i], reply)
        self._accepted += verdict.accepted
        self._samples[i][number] = Sample(number, reply, verdict)

    def _key(self, i: int, number: int) -> str:
        drawing = self._settings.drawing.given()
        return key_of(
            "sample", self._teacher.identity, texts(self._questions[i].messages), drawing, self._settings.seed, number
        )

    def _progress(self) -> Progress:
        total = len(self._questions) * self._settings.samples
        done = self._cached + self._asked + len(self._unanswered)
        spent = time.monotonic() - self._began
        left = spent / self._asked * (total - done) if self._asked else None
        return Progress(done, total, self._cached, self._accepted, len(self._unanswered), left)


def choose(samples: Sequence[Sample], keep: int | None) -> list[Sample]:
    """Mark the `keep` shortest accepted answers of one prompt as kept, the earlier one of equals; None: all of them."""
    chosen: dict[str, int] = {}
    for sample in shortest_first([s for s in samples if s.verdict.accepted]):
        if keep is None or len(chosen) < keep:
            chosen.setdefault(sample.reply.text, sample.number)
    return [replace(s, kept=s.number in chosen.values()) for s in samples]


def shortest_first(samples: Iterable[Sample]) -> list[Sample]:
    """Sort samples by tokens, or by characters where a server did not count tokens of every one."""
    found = list(samples)
    counted = all(s.reply.tokens is not None for s in found)

    def length(sample: Sample) -> tuple[Any, int]:
        return sample.reply.tokens if counted else len(sample.reply.text), sample.number

    return sorted(found, key=length)
