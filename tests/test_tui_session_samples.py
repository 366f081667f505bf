"""Several samples, what goes on and what is counted in a conversation without a screen."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fake_backend import FIGURES, GONE, HOLD, FakeBackend, words
from sessions import ask, play, ready, said

from edger1.messages import Done, Failed, Figures, Running, Sampled, Text, Thought
from edger1.tui.hearing import thought_tokens
from edger1.tui.recorder import Recorder
from edger1.tui.session import Begun, State
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.tree import Node
from edger1.tui.votes import tally_of

SAMPLED = Settings(samples=3)


def test_the_majority_of_several_samples_is_shown_and_the_others_are_kept(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store.open(tmp_path / "c.db")
        backend = FakeBackend(
            [*words("It is 5."), FIGURES],
            [Thought("", "hm"), *words("It is 4."), FIGURES],
            [*words("it is  4."), FIGURES],
            [Text("", "So."), FIGURES],
        )
        recorder = Recorder(store, lambda said: None)
        session = await ready(backend, settings=SAMPLED, recorder=recorder)
        events = await ask(session, "2 + 2?")
        assert [each for each in events if isinstance(each, Sampled)] == [Sampled("", done, 3) for done in range(4)]
        # Only the first one is told as it comes.
        assert "".join(each.text for each in events if isinstance(each, Text)) == "It is 5."
        winner = session.tree.path()[-1]
        assert (winner.text, winner.thought, winner.finish) == ("It is 4.", "hm", "stop")
        assert winner.figures is not None
        assert [count for _, count in tally_of(winner)[1]] == [2, 1]
        first, second, third = session.tree.siblings(winner.id)
        assert [each.text for each in (first, second, third)] == ["It is 5.", "It is 4.", "it is  4."]
        assert tally_of(first)[0] != tally_of(second)[0] == tally_of(third)[0]
        assert tally_of(winner)[1] == [("It is 4.", 2), ("It is 5.", 1)]
        assert backend.settings == [SAMPLED]
        assert isinstance(events[-1], Done)
        assert session.state is State.READY
        # What follows goes on from the winner.
        session.talk.change(Settings())
        await ask(session, "and then?")
        assert [each["content"] for each in backend.asked[1]] == ["2 + 2?", "It is 4.", "and then?"]
        await recorder.settled()
        stored = store.load(store.list()[0].id)
        assert [node.text for node in stored.tree.path()] == said(session)
        assert [tally_of(node) for node in stored.tree] == [tally_of(node) for node in session.tree]
        assert stored.tree.siblings(winner.id)[0].finish == "stop"

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_stopping_stops_all_samples_and_those_that_are_whole_vote() -> None:
    async def run() -> None:
        backend = FakeBackend(
            [*words("Half of "), HOLD, *words("it"), FIGURES],
            [*words("Whole."), FIGURES],
            [HOLD, *words("Never"), FIGURES],
        )
        session = await ready(backend, settings=SAMPLED)
        events = []
        async for event in session.ask(Node("user", "a")):
            events.append(event)
            if isinstance(event, Sampled) and event.done == 1:
                assert session.stop()
                assert session.state is State.STOPPING
        assert said(session) == ["a", "Whole."]
        assert [(each.text, each.finish) for each in session.tree.siblings(session.tree.path()[-1].id)] == [
            ("Half of ", "cancelled"),
            ("Whole.", "stop"),
        ]
        assert session.state is State.READY
        assert len([each for each in events if isinstance(each, Sampled)]) == 4

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_samples_that_were_stopped_before_a_word_leave_the_question_to_be_asked_again() -> None:
    async def run() -> None:
        session = await ready(FakeBackend([HOLD, FIGURES]), settings=SAMPLED)
        async for event in session.ask(Node("user", "a")):
            if isinstance(event, Begun) and event.node.role == "assistant":
                asyncio.get_running_loop().call_soon(session.stop)
        assert said(session) == []
        assert session.state is State.READY

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_samples_that_are_whole_when_the_engine_dies_have_voted() -> None:
    async def run() -> None:
        backend = FakeBackend([*words("Half"), HOLD, GONE], [*words("Four."), FIGURES], [*words("Four."), FIGURES])
        session = await ready(backend, settings=SAMPLED)
        events = []
        async for event in session.ask(Node("user", "a")):
            events.append(event)
            if isinstance(event, Sampled) and event.done == 2:
                backend.release()
        assert isinstance(events[-1], Failed)
        assert session.state is State.ASLEEP
        assert said(session) == ["a", "Four."]
        assert tally_of(session.tree.path()[-1])[1] == [("Four.", 2)]
        assert session.tree.siblings(session.tree.path()[-1].id)[0].finish == "failed"

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_an_answer_that_goes_on_is_one() -> None:
    async def run() -> None:
        backend = FakeBackend([*words("One, "), Done("", "length")], [*words("two."), FIGURES])
        session = await ready(backend)
        await ask(session, "a")
        session.talk.change(SAMPLED)
        await play(session.go_on(session.tree.path()[-1].id))
        assert said(session) == ["a", "One, two."]
        assert backend.settings[-1].samples == 1

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_the_figures_of_samples_are_those_of_all_that_run() -> None:
    def running(rate: float, hits: int) -> Running:
        layer = {"layer": 3, "hits": hits, "misses": 1, "experts": {hits: 2}}
        return Running("", Figures(decode_tokens_per_s=rate), [layer])

    async def run() -> None:
        backend = FakeBackend(
            [Text("", "a"), running(10, 1), HOLD, running(12, 4), FIGURES],
            [Text("", "b"), running(11, 2), running(13, 2), HOLD, FIGURES],
        )
        session = await ready(backend, settings=Settings(samples=2))
        told = []
        async for event in session.ask(Node("user", "a")):
            if isinstance(event, Running):
                told.append(event)
            elif isinstance(event, Text):
                asyncio.get_running_loop().call_later(0.05, backend.release)
        assert [each.figures.decode_tokens_per_s for each in told] == [10, 25]
        assert len({each.id for each in told}) == 1
        assert told[1].layers == [{"layer": 3, "hits": 8, "misses": 3, "experts": {2: 4, 4: 2}}]

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_the_tokens_of_a_thought_that_goes_on_are_counted_together() -> None:
    def ended(finish: str, tokens: int) -> Done:
        done = Done("", finish)
        if "thought_tokens" in vars(done.usage):
            object.__setattr__(done.usage, "thought_tokens", tokens)
        return done

    async def run() -> None:
        backend = FakeBackend(
            [Thought("", "hm"), ended("length", 5)], [Thought("", "hm"), Text("", "4"), ended("stop", 3)]
        )
        session = await ready(backend)
        await ask(session, "a")
        node = next(each for each in session.tree if each.role == "assistant")
        assert thought_tokens(node) == 5
        await play(session.go_on(node.id))
        assert thought_tokens(node) == 8

    asyncio.run(asyncio.wait_for(run(), timeout=90))
