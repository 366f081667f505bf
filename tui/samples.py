"""Several answers to one question, written at the same time, of which the majority decides.

The first is shown as it comes. The others are kept beside it, as its siblings in the tree, from their first word on;
when all are over, each that voted knows the tally, and the winner is told. Knows neither the screen nor the disk.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from edger1.messages import Done, Event, Failed, OfSample, Progress, Running, Sampled, Text, Thought
from edger1.tui.hearing import Hearing, Pages
from edger1.tui.tree import Node
from edger1.tui.votes import keep, majority


@dataclass(frozen=True)
class FirstEnded:
    """The sample that is shown is over; the others may not be."""

    node: Node


@dataclass(frozen=True)
class Voted:
    """All samples are over, and this one is to be shown."""

    node: Node


SampleEvent = Event | FirstEnded | Voted


class Samples:
    """The samples of one answer. Iterate over `run` once; `stop` may be called meanwhile.

    `nodes` are empty messages with one parent. `begin` makes one of them a part of the conversation, at its first word;
    with `first_begun` the first one is.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        pages: Pages,
        begin: Callable[[Node], object],
        clock: Callable[[], float],
        *,
        first_begun: bool = True,
    ) -> None:
        self.nodes = list(nodes)
        self._pages = pages
        self._begin = begin
        self._clock = clock
        self._began = clock()
        self._hearings: dict[int, Hearing] = {}
        if first_begun:
            self._hearings[0] = Hearing(pages, nodes[0], clock, began=self._began)
        self._ends: dict[int, Done] = {}
        self._stopped = False
        self._running: dict[int, Running] = {}
        self._layers: dict[int, dict[str, Any]] = {}

    @property
    def silent(self) -> bool:
        """Whether none of them has a word of an answer."""
        return not any(node.text.strip() for node in self.nodes)

    def stop(self) -> None:
        """Keep no word that comes after this. Stopping the engine is the caller's."""
        self._stopped = True

    async def run(self, asked: AsyncIterator[Event]) -> AsyncGenerator[SampleEvent, None]:
        """Yield what the first one says, how many are over, the figures of all, what came of the vote, and the end.

        `asked` are the engine's events, which end with Done or Failed.
        """
        # Where it was stopped before anything could be asked, nothing is.
        end: Done | Failed = Done("", "cancelled")
        try:
            yield Sampled("", 0, len(self.nodes))
            async with aclosing(asked if not self._stopped else _nothing()) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, OfSample) and event.number < len(self.nodes):
                        for each in self._take(event.number, event.event):
                            yield each
                    elif isinstance(event, Done | Failed):
                        end = event
                    elif isinstance(event, Sampled):
                        yield event
        finally:
            for hearing in self._hearings.values():
                hearing.end()
        yield Voted(self.nodes[self._vote()])
        yield end

    def _take(self, at: int, event: Event) -> list[SampleEvent]:
        if isinstance(event, Running):
            return self._told(at, event)
        if isinstance(event, Text | Thought):
            if self._stopped:
                return []
            if at not in self._hearings:
                self._begin(self.nodes[at])
                self._hearings[at] = Hearing(self._pages, self.nodes[at], self._clock, began=self._began)
            self._hearings[at].hear(event)
            return [event] if at == 0 else []
        if isinstance(event, Done):
            self._ends.setdefault(at, event)
            self._running.pop(at, None)
            if at in self._hearings:
                self._hearings[at].hear(event)
            return [FirstEnded(self.nodes[0])] if at == 0 else []
        return [event] if at == 0 and isinstance(event, Progress) else []

    def _told(self, at: int, running: Running) -> list[SampleEvent]:
        """Return the figures of all that run, once for each round of them."""
        self._running[at] = running
        for layer in running.layers or ():
            _add(self._layers.setdefault(layer["layer"], {**layer, "hits": 0, "misses": 0, "experts": {}}), layer)
        if at != min(self._running):
            return []
        rate = sum(each.figures.decode_tokens_per_s or 0.0 for each in self._running.values())
        layers, self._layers = list(self._layers.values()), {}
        figures = replace(running.figures, decode_tokens_per_s=rate or None)
        return [Running(self.nodes[0].id, figures, None if running.layers is None else layers)]

    def _vote(self) -> int:
        """Have the samples that came to their end vote, and keep that with each; returns which one is shown."""
        said = [at for at in sorted(self._ends) if self.nodes[at].text.strip()]
        # What was cut at its length may have had its answer still before it.
        voters = [at for at in said if self._ends[at].finish_reason == "stop"]
        voters = voters or [at for at in said if self._ends[at].finish_reason == "length"]
        if not voters:
            return next((at for at, node in enumerate(self.nodes) if node.text.strip()), 0)
        vote = majority([self.nodes[at].text for at in voters])
        for at, answer in zip(voters, vote.answers, strict=True):
            keep(self.nodes[at], answer, vote.tally, [self.nodes[each] for each in voters])
            self._pages.finish(self.nodes[at])
        return voters[vote.winner]


def _add(total: dict[str, Any], layer: dict[str, Any]) -> None:
    total["hits"] += layer["hits"]
    total["misses"] += layer["misses"]
    for expert, uses in layer["experts"].items():
        total["experts"][expert] = total["experts"].get(expert, 0) + uses


async def _nothing() -> AsyncGenerator[Event, None]:
    return
    yield
