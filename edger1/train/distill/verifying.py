"""Which of a teacher's answers are right, by rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edger1.tasks.task import Question
from edger1.train.distill.teachers import Reply
from edger1.train.rewards.completion import Completion

if TYPE_CHECKING:
    from edger1.train.rewards.opening import Rewards

_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is taken, why not ("wrong", "cut off"), and what every reward gave it."""

    accepted: bool
    why: str = ""
    scores: dict[str, float] = field(default_factory=dict)


class Verifier:
    """Takes answers that their teacher ended and to which every reward gives at least `at_least`.

    Without rewards all that were ended are taken.
    """

    def __init__(self, rewards: Rewards | None, at_least: float = 1.0) -> None:
        self._rewards = rewards
        self.at_least = at_least

    def judge(self, question: Question, reply: Reply) -> Verdict:
        """Return the verdict on one answer. Raises RewardError where a reward fails."""
        if not reply.finished:
            # What was cut off would teach to end in the middle of a sentence.
            return Verdict(False, "cut off")
        if self._rewards is None:
            return Verdict(True)
        completion = Completion.from_text(
            question.messages,
            reply.text,
            columns=question.columns,
            tokens=reply.tokens or 0,
            finished=True,
            where=question.where,
        )
        scores = self._rewards.score([completion])[0]
        accepted = all(value >= self.at_least - _TOLERANCE for value in scores.values())
        return Verdict(accepted, "" if accepted else "wrong", scores)
