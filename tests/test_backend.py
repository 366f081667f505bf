"""The chat's engine in its process: one model after the other, what is asked of it, and its end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

from edger1.cli.backend import ChildBackend
from edger1.messages import Done, Event, Failed, Loaded, OfSample, Progress, Sampled, Sampling, Text
from edger1.tui.backend import Backend
from edger1.tui.settings import Settings

ASKED = [{"role": "user", "content": "Hello"}]
GREEDY = Settings(sampling=Sampling(temperature=0), max_tokens=8)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path) -> Iterator[ChildBackend]:
    backend = ChildBackend(tiny_folder, memory=None, context=50_000, precision="exact")
    asyncio.run(last(backend.load()))
    yield backend
    asyncio.run(backend.close())


def run(folder: Path | None, scenario: Callable[[ChildBackend], Awaitable[None]], **options: Any) -> None:
    async def inside() -> None:
        backend = ChildBackend(folder, **{"memory": None, "context": None, "precision": "exact", **options})
        try:
            await scenario(backend)
        finally:
            await backend.close()

    asyncio.run(asyncio.wait_for(inside(), timeout=100))


async def last(events: AsyncIterator[Event]) -> Event:
    return [event async for event in events][-1]


async def text_of(backend: Backend, settings: Settings = GREEDY, **options: Any) -> str:
    events = [event async for event in backend.ask(ASKED, settings=settings, **options)]
    assert isinstance(events[-1], Done), events[-1]
    return "".join(event.text for event in events if isinstance(event, Text))


def test_another_model_takes_the_place_of_the_present_one(tiny_folder: Path, other_folder: Path) -> None:
    async def scenario(backend: ChildBackend) -> None:
        assert isinstance(await last(backend.load()), Loaded)
        first, pid = await text_of(backend), backend.pid
        backend.choose("other", other_folder)
        # The present model goes on until the other is loaded.
        assert await text_of(backend) == first
        loaded = await last(backend.load())
        assert isinstance(loaded, Loaded)
        assert loaded.info["name"] == "other"
        assert await text_of(backend) != first
        backend.choose("tiny", tiny_folder)
        await last(backend.load())
        assert await text_of(backend) == first
        assert backend.pid == pid

    run(tiny_folder, scenario)


def test_two_models_are_never_there_at_once(tiny_folder: Path, other_folder: Path) -> None:
    import edger1

    # Both together do not fit.
    need = edger1.plan(tiny_folder).total_bytes

    async def scenario(backend: ChildBackend) -> None:
        for folder in (other_folder, tiny_folder, other_folder):
            backend.choose("m", folder)
            assert isinstance(await last(backend.load()), Loaded)
            await text_of(backend)

    run(tiny_folder, scenario, memory=need + 2**20)


def test_a_model_that_does_not_load_leaves_the_choice_of_another(
    tiny_folder: Path, other_folder: Path, tmp_path: Path
) -> None:
    async def scenario(backend: ChildBackend) -> None:
        await last(backend.load())
        pid = backend.pid
        backend.choose("gone", tmp_path)
        failed = await last(backend.load())
        assert isinstance(failed, Failed)
        assert failed.error == "FormatError"
        unasked = await last(backend.ask(ASKED, settings=GREEDY))
        assert isinstance(unasked, Failed)
        assert await backend.count_tokens("Hello") is None
        backend.choose("other", other_folder)
        assert isinstance(await last(backend.load()), Loaded)
        assert await text_of(backend)
        assert backend.pid == pid

    run(tiny_folder, scenario)


def test_an_engine_begins_without_a_model(tiny_folder: Path) -> None:
    async def scenario(backend: ChildBackend) -> None:
        failed = await last(backend.load())
        assert isinstance(failed, Failed)
        assert failed.error == "UsageError"
        assert await backend.count_tokens("Hello") is None
        backend.choose("tiny", tiny_folder)
        assert isinstance(await last(backend.load()), Loaded)
        assert await text_of(backend)

    run(None, scenario)


def test_a_load_that_is_left_leaves_nothing_behind(tiny_folder: Path, other_folder: Path) -> None:
    async def scenario(backend: ChildBackend) -> None:
        async with aclosing(backend.load()) as events:  # type: ignore[type-var]
            async for event in events:
                assert isinstance(event, Progress)
                break
        backend.choose("other", other_folder)
        assert isinstance(await last(backend.load()), Loaded)
        assert await text_of(backend)

    # Were the first there as well, the other would not fit.
    import edger1

    run(tiny_folder, scenario, memory=edger1.plan(tiny_folder).total_bytes + 2**20)


def test_an_engine_that_was_killed_is_started_for_another_model(tiny_folder: Path, other_folder: Path) -> None:
    async def scenario(backend: ChildBackend) -> None:
        await last(backend.load())
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        failed = await last(backend.ask(ASKED, settings=GREEDY))
        assert isinstance(failed, Failed)
        assert failed.error == "EngineError"
        assert backend.pid is None
        backend.choose("other", other_folder)
        assert isinstance(await last(backend.load()), Loaded)
        assert await text_of(backend)

    run(tiny_folder, scenario)


def test_settings_and_continuation_reach_the_engine(loaded: ChildBackend) -> None:
    async def scenario(backend: ChildBackend) -> None:
        whole = await text_of(backend)
        assert len(whole) == 8
        hot = Settings(sampling=Sampling(temperature=2.0, seed=3), max_tokens=8)
        assert await text_of(backend, hot) == await text_of(backend, hot) != whole
        messages = [*ASKED, {"role": "assistant", "content": whole[:3]}]
        settings = Settings(sampling=Sampling(temperature=0), max_tokens=5)
        events = [e async for e in backend.ask(messages, settings=settings, continue_last=True)]
        assert "".join(e.text for e in events if isinstance(e, Text)) == whole[3:]
        refused = await last(backend.ask(ASKED, settings=GREEDY, tools=[{"name": "no schema"}]))
        assert isinstance(refused, Failed)
        assert refused.error == "UsageError"

    asyncio.run(asyncio.wait_for(scenario(loaded), timeout=120))


def test_a_conversation_longer_than_the_context_goes_on_where_that_is_asked_for(tiny_folder: Path) -> None:
    turns = [{"role": role, "content": "word " * 10} for role in ("user", "assistant") * 4]
    messages = [*turns, *ASKED]

    async def scenario(backend: ChildBackend) -> None:
        assert isinstance(await last(backend.load()), Loaded)
        refused = await last(backend.ask(messages, settings=GREEDY))
        assert isinstance(refused, Failed)
        assert refused.error == "ContextError"
        shifting = replace(GREEDY, context_shift=True)
        done = await last(backend.ask(messages, settings=shifting))
        assert isinstance(done, Done)
        assert "oldest turns" in done.notes[0]

    run(tiny_folder, scenario, context=256)


def test_bounds_of_the_thought_and_drafts_reach_the_engine(tiny_folder: Path, other_folder: Path) -> None:
    async def scenario(backend: ChildBackend) -> None:
        assert isinstance(await last(backend.load()), Loaded)
        for settings, reason in (
            (Settings(think_budget=-1), "think_budget is -1"),
            (Settings(think_at_least=-2), "think_at_least is -2"),
            (Settings(speculate="mtp"), "without an MTP layer"),
        ):
            refused = await last(backend.ask(ASKED, settings=settings))
            assert isinstance(refused, Failed)
            assert reason in refused.message
        plain = await text_of(backend)
        drafted = replace(GREEDY, speculate="draft")
        done = await last(backend.ask(ASKED, settings=drafted))
        assert isinstance(done, Done)
        assert done.figures.drafts is not None
        assert done.figures.drafts["drafted"] > 0
        assert await text_of(backend, drafted) == plain
        # It drafts for the model that it was named with, and for no other.
        backend.choose("other", other_folder)
        assert isinstance(await last(backend.load()), Loaded)
        refused = await last(backend.ask(ASKED, settings=drafted))
        assert isinstance(refused, Failed)
        assert "without a draft model" in refused.message

    run(tiny_folder, scenario, draft=other_folder)


def test_several_are_answered_at_once_and_stopped_together(loaded: ChildBackend) -> None:
    async def scenario(backend: ChildBackend) -> None:
        ended: list[str] = []

        async def ask(seed: int, tokens: int) -> str:
            settings = Settings(sampling=Sampling(temperature=2.0, seed=seed), max_tokens=tokens)
            said = []
            async for event in backend.ask(ASKED, settings=settings):
                if isinstance(event, Text):
                    said.append(event.text)
                    if tokens > 8:
                        backend.cancel()
                elif isinstance(event, Done):
                    ended.append(event.finish_reason)
            return "".join(said)

        alone = [await ask(seed, 8) for seed in range(3)]
        assert await asyncio.gather(*(ask(seed, 8) for seed in range(3))) == alone
        ended.clear()
        await asyncio.gather(*(ask(seed, 40_000) for seed in range(3)))
        assert ended == ["cancelled"] * 3

    asyncio.run(asyncio.wait_for(scenario(loaded), timeout=120))


def test_samples_are_told_as_they_come_and_stopped_together(loaded: ChildBackend) -> None:
    async def scenario(backend: ChildBackend) -> None:
        hot = Settings(sampling=Sampling(temperature=2.0, seed=5), max_tokens=8)
        alone = [await text_of(backend, replace(hot, sampling=Sampling(2.0, seed=5 + at))) for at in range(3)]
        said = [""] * 3
        events = [event async for event in backend.ask(ASKED, settings=replace(hot, samples=3))]
        for event in events:
            if isinstance(event, OfSample) and isinstance(event.event, Text):
                said[event.number] += event.event.text
        assert said == alone
        assert [event.done for event in events if isinstance(event, Sampled)] == [1, 2, 3]
        # What was told of each is not said again.
        assert not [event for event in events if isinstance(event, Text)]
        assert isinstance(events[-1], Done)
        ended: list[str] = []
        many = Settings(sampling=Sampling(temperature=2.0), max_tokens=40_000, samples=3)
        async for event in backend.ask(ASKED, settings=many):
            if isinstance(event, OfSample) and isinstance(event.event, Text):
                backend.cancel()
            elif isinstance(event, OfSample) and isinstance(event.event, Done):
                ended.append(event.event.finish_reason)
        assert ended == ["cancelled"] * 3

    asyncio.run(asyncio.wait_for(scenario(loaded), timeout=120))


def test_tokens_are_counted_while_it_answers(loaded: ChildBackend) -> None:
    async def scenario(backend: ChildBackend) -> None:
        assert await backend.count_tokens("") == 0
        assert await backend.count_tokens("Hello <think>") == 7
        counted: list[int | None] = []
        async for event in backend.ask(ASKED, settings=Settings(max_tokens=100)):
            if isinstance(event, Text) and not counted:
                counted.append(await backend.count_tokens("abc"))
                backend.cancel()
            done = event
        assert counted == [3]
        assert isinstance(done, Done)
        assert done.finish_reason == "cancelled"

    asyncio.run(asyncio.wait_for(scenario(loaded), timeout=120))


def test_an_answer_that_nobody_hears_any_more_is_stopped(loaded: ChildBackend) -> None:
    async def scenario(backend: ChildBackend) -> None:
        async with aclosing(backend.ask(ASKED, settings=Settings(max_tokens=40_000))) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Text):
                    break
        # A cancel that comes after does nothing to the next.
        backend.cancel()
        assert len(await text_of(backend)) == 8

    asyncio.run(asyncio.wait_for(scenario(loaded), timeout=120))
