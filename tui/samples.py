"""Several answers to one question, written at the same time, of which the majority decides.

The first is shown as it comes. The others are kept beside it, as its siblings in the tree, from their first word on;
when all are over, each that voted knows the tally, and the winner is told. Knows neither the screen nor the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from edger1.messages import Done, Event, Failed, Progress, Running, Text, Thought
from edger1.tui.hearing import Hearing, Pages
from edger1.tui.settings import Settings
from edger1.tui.tree import Node
from edger1.tui.votes import keep, majority

Ask = Callable[[Settings], AsyncIterator[Event]]


@dataclass(frozen=True)
class Sampled:
    """So many of the samples are over."""

    done: int
    of: int


@dataclass(frozen=True)
class FirstEnded:
    """The sample that is shown is over; the others may not be."""

    node: Node


@dataclass(frozen=True)
class Voted:
    """All samples are over, and this one is to be shown."""

    node: Node


SampleEvent = Event | Sampled | FirstEnded | Voted


class Samples:
    """The samples of one answer. Iterate over `run` once; `stop` may be called meanwhile.

    `nodes` are empty messages with one parent. `begin` makes one of them a part of the conversation, at its first word;
    with `first_begun` the first one is. `ask` asks the engine under given settings, and its events end with Done or
    Failed.
    """

    def __init__(
        self,
        settings: Settings,
        nodes: Sequence[Node],
        ask: Ask,
        pages: Pages,
        begin: Callable[[Node], object],
        clock: Callable[[], float],
        *,
        first_begun: bool = True,
    ) -> None:
        self.nodes = list(nodes)
        self._settings = settings
        self._ask = ask
        self._pages = pages
        self._begin = begin
        self._hearings: list[Hearing | None] = [None] * len(nodes)
        self._clock = clock
        self._began = clock()
        if first_begun:
            self._hearings[0] = Hearing(pages, nodes[0], clock, began=self._began)
        self._ends: dict[int, Done | Failed] = {}
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

    async def run(self) -> AsyncGenerator[SampleEvent, None]:
        """Yield what the first one says, how many are over, the figures of all, and what came of the vote.

        Ends with Failed where no sample came to an end of its own and the engine said why, else with the Done of the
        one that is shown.
        """
        heard: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        async def listen(at: int) -> None:
            if self._stopped:
                heard.put_nowait((at, Done("", "cancelled")))
                return
            async with aclosing(self._ask(self._drawn(at))) as events:  # type: ignore[type-var]
                async for event in events:
                    heard.put_nowait((at, event))

        listeners = [asyncio.create_task(listen(at)) for at in range(len(self.nodes))]
        try:
            yield Sampled(0, len(self.nodes))
            while len(self._ends) < len(self.nodes):
                for event in self._take(*await heard.get()):
                    yield event
        finally:
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)
            for hearing in self._hearings:
                if hearing is not None:
                    hearing.end()
        for last in self._decide():
            yield last

    def _drawn(self, at: int) -> Settings:
        """Return what a sample is asked under: with a seed, each has one of its own."""
        seed = self._settings.sampling.seed
        sampling = self._settings.sampling
        return self._settings if seed is None else replace(self._settings, sampling=replace(sampling, seed=seed + at))

    def _take(self, at: int, event: Event) -> list[SampleEvent]:
        if isinstance(event, Running):
            return self._told(at, event)
        if isinstance(event, Text | Thought):
            if self._stopped:
                return []
            hearing = self._hearings[at]
            if hearing is None:
                self._begin(self.nodes[at])
                hearing = self._hearings[at] = Hearing(self._pages, self.nodes[at], self._clock, began=self._began)
            hearing.hear(event)
            return [event] if at == 0 else []
        if isinstance(event, Done | Failed) and at not in self._ends:
            self._ends[at] = event
            self._running.pop(at, None)
            hearing = self._hearings[at]
            if hearing is not None:
                hearing.hear(event)
            first: list[SampleEvent] = [FirstEnded(self.nodes[0])] if at == 0 else []
            return [*first, Sampled(len(self._ends), len(self.nodes))]
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

    def _decide(self) -> list[SampleEvent]:
        best = self._vote()
        node, end = self.nodes[best], self._ends[best]
        failures = [each for each in self._ends.values() if isinstance(each, Failed)]
        gone = [each for each in failures if each.error == "EngineError"]
        if gone or isinstance(end, Failed):
            return [Voted(node), (gone or failures)[0]]
        rates = [each.figures.decode_tokens_per_s or 0.0 for each in self._ends.values() if isinstance(each, Done)]
        notes = list(end.notes)
        if failures:
            notes.append(f"{len(failures)} of {len(self.nodes)} samples failed. {failures[0].message}")
        figures = replace(end.figures, decode_tokens_per_s=sum(rates) or None)
        return [Voted(node), replace(end, figures=figures, notes=notes)]

    def _vote(self) -> int:
        """Have the samples that came to their end vote, and keep that with each; returns which one is shown."""
        ended = {at: end.finish_reason for at, end in self._ends.items() if isinstance(end, Done)}
        # What was cut at its length may have had its answer still before it.
        voters = [at for at in sorted(ended) if ended[at] == "stop" and self.nodes[at].text.strip()]
        voters = voters or [at for at in sorted(ended) if ended[at] == "length" and self.nodes[at].text.strip()]
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
