"""Several samples of one answer, and the vote on them (self-consistency, arXiv 2203.11171).

All are asked for at once and decoded together, as any requests are; the first one's prompt is prefilled, and the others
begin with copies of its KV cache. Sample i draws with the seed + i: it is the answer that this seed has alone.

Each sample that came to its own end votes for its final answer (`final_answers`): numbers are the same as numbers, the
rest as text. The answer with most votes wins, of several the one that came from the lowest sample; what is said is the
lowest sample with that answer, whole. Samples that were cut off vote only where no other can.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edger1 import sampling
from edger1.cache import Entry
from edger1.final_answers import final_answer, plain, vote_key
from edger1.generate import Generation
from edger1.messages import Done, Event, Generate, OfSample, Progress, Running, Sampled, Text, Thought, ToolCall
from edger1.sampling import RandomTurn

if TYPE_CHECKING:
    from edger1.loader import LiveModel


@dataclass
class _Said:
    """What a sample has said so far."""

    events: list[Text | Thought | ToolCall] = field(default_factory=list)
    done: Done | None = None

    def add(self, event: Text | Thought | ToolCall) -> None:
        """Take a piece of it, joined to the one before it where they are of a kind."""
        last = self.events[-1] if self.events else None
        if isinstance(event, Text | Thought) and type(event) is type(last):
            assert isinstance(last, Text | Thought)
            self.events[-1] = replace(last, text=last.text + event.text)
        else:
            self.events.append(event)

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def whole(self) -> bool:
        """Whether it came to its own end."""
        return self.done is not None and self.done.finish_reason in ("stop", "tools")

    def answer(self) -> tuple[str, str] | None:
        """Return what equal answers have in common, and this one as it is shown; None where there is none."""
        key = vote_key(self.text)
        if key is not None:
            return key, plain(final_answer(self.text), case=True)
        calls = [[event.name, event.arguments] for event in self.events if isinstance(event, ToolCall)]
        shown = json.dumps(calls, ensure_ascii=False, sort_keys=True)
        return (shown, shown) if calls else None


def count(said: list[_Said]) -> tuple[dict[str, int], int]:
    """Return the votes on each answer, the most first, and which of the samples is said."""
    answers = {i: found for i, each in enumerate(said) if (found := each.answer()) is not None}
    voters = [i for i in answers if said[i].whole] or list(answers)
    by_key: dict[str, list[int]] = {}
    for i in voters:
        by_key.setdefault(answers[i][0], []).append(i)
    # Sorting keeps the order of equals: that of the lowest sample.
    ranked = sorted(by_key.values(), key=len, reverse=True)
    votes = {answers[each[0]][1]: len(each) for each in ranked}
    first = next((i for i, each in enumerate(said) if each.whole), 0)
    return votes, ranked[0][0] if ranked else first


class Samples:
    """One request with several samples. `jobs` are what the scheduler runs."""

    def __init__(self, model: LiveModel, request: Generate, emit: Callable[[Event], None], turn: RandomTurn) -> None:
        self._request = request
        self._emit = emit
        self._over = False
        chosen = sampling.resolve(request.sampling, model.sampling)
        # At temperature 0 all would be the same.
        self._drawn = request.samples if chosen.temperature else 1
        self._said = [_Said() for _ in range(self._drawn)]
        self.jobs: list[Sample] = []
        for i in range(self._drawn):
            seed = None if chosen.seed is None else (chosen.seed + i) % 2**64
            alone = replace(request, samples=1, sampling=replace(request.sampling, seed=seed))
            self.jobs.append(Sample(model, alone, self, i, turn))

    def take(self, number: int, event: Event) -> None:
        """Take an event of a sample."""
        if self._over:
            return
        if self._request.each_sample and isinstance(event, Progress | Thought | Text | ToolCall | Running | Done):
            self._emit(OfSample(self._request.id, number, event))
        if isinstance(event, Text | Thought | ToolCall):
            self._said[number].add(event)
        elif isinstance(event, Done):
            self._said[number].done = event
            self._count()
        elif isinstance(event, Progress | Running):
            running = next(i for i, each in enumerate(self._said) if each.done is None)
            if number == running and not self._request.each_sample:
                self._emit(event)

    def give_up(self) -> None:
        """End all samples: one of them has failed, which the scheduler says."""
        self._over = True
        for job in self.jobs:
            job.withdraw()

    def _count(self) -> None:
        finished = [each for each in self._said if each.done is not None]
        votes, _ = count(finished)
        if self._drawn > 1:
            self._emit(Sampled(self._request.id, len(finished), self._drawn, votes))
        if len(finished) == self._drawn:
            self._over = True
            self._finish()

    def _finish(self) -> None:
        votes, chosen = count(self._said)
        said = self._said[chosen]
        assert said.done is not None
        for event in () if self._request.each_sample else said.events:
            self._emit(event)
        ends = [each.done for each in self._said if each.done is not None]
        cancelled = any(done.finish_reason == "cancelled" for done in ends)
        usage = replace(
            said.done.usage,
            cached_tokens=ends[0].usage.cached_tokens,
            prefilled_tokens=sum(done.usage.prefilled_tokens for done in ends),
            completion_tokens=sum(done.usage.completion_tokens for done in ends),
            thought_tokens=sum(done.usage.thought_tokens for done in ends),
        )
        first, last = min(job.began for job in self.jobs), max(job.ended for job in self.jobs)
        decoded = usage.completion_tokens - 1
        figures = replace(
            said.done.figures,
            prefill_tokens_per_s=ends[0].figures.prefill_tokens_per_s,
            time_to_first_token_s=ends[0].figures.time_to_first_token_s,
            decode_tokens_per_s=decoded / (last - first) if decoded > 0 and last > first > 0 else None,
        )
        self._emit(
            Done(
                self._request.id,
                "cancelled" if cancelled else said.done.finish_reason,
                usage=usage,
                figures=figures,
                notes=[*said.done.notes, *self._notes(votes)],
                votes=votes,
                samples=[each.text for each in self._said],
            )
        )

    def _notes(self, votes: dict[str, int]) -> list[str]:
        if self._drawn < self._request.samples:
            return ["At temperature 0 all samples are the same, so that one was drawn."]
        silent = self._drawn - sum(votes.values())
        return [f"{silent} of the {self._drawn} samples came to no answer of their own."] if silent else []


class Sample(Generation):
    """One of several samples: the first shares its prompt's KV cache, the others wait for that."""

    def __init__(self, model: LiveModel, request: Generate, group: Samples, number: int, turn: RandomTurn) -> None:
        super().__init__(model, request, lambda event: group.take(number, event), turn)
        self._group = group
        self._number = number
        self._has_shared = False

    @property
    def began(self) -> float:
        """When its first token was said, by the clock of performance counters; 0 where none was."""
        return self._clock.first

    @property
    def ended(self) -> float:
        """When its last token was said."""
        return self._clock.last

    def withdraw(self) -> None:
        """End at the next step."""
        self._said.finish = self._said.finish or "cancelled"

    def _step(self, *, ahead: bool) -> bool:
        if self._said.finish is not None:
            self._come_back()
            self.finish()
            return True
        done = super()._step(ahead=ahead)
        self._share()
        return done

    def _begin(self) -> bool:
        if self._number and not self._group.jobs[0].has_shared:
            return False
        begun = super()._begin()
        self._share()
        return begun

    @property
    def has_shared(self) -> bool:
        """Whether others need not wait for its prompt's KV cache, be it that they will not have it."""
        return self._has_shared or self._said.finish is not None

    def _share(self) -> None:
        """Leave a copy of the prompt's KV cache for the others, where there is room for it."""
        if self._has_shared or self._number or self._caches is None or self._waiting > 1:
            return
        self._has_shared = True
        kv = self._model.kv
        if not self._said.tokens and kv.nbytes + sum(c.nbytes for c in self._caches) <= self._model.plan.kv_bytes:
            kv.put(Entry(list(self._fed), "", copy.deepcopy(self._caches)))

    def drop(self) -> None:
        """End without a word, the other samples too."""
        super().drop()
        self._has_shared = True
        self._group.give_up()
