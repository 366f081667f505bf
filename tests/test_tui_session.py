"""A conversation with a scripted engine, without a screen: what is kept, branched, gone on with and recorded."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fake_backend import FIGURES, GONE, HOLD, FakeBackend, Step, words
from sessions import ask, play, ready, said

from edger1.messages import Done, Failed, Text, Thought, ToolCall
from edger1.tools import Result, Tool
from edger1.tui.recorder import Recorder
from edger1.tui.session import Begun, Ended, Rewound, State
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.title import tidy
from edger1.tui.tree import Node, Tree


def test_a_question_and_its_answer_are_two_messages() -> None:
    async def run() -> None:
        session = await ready(
            FakeBackend([Thought("", "hm"), *words("Four."), FIGURES]), clock=iter(range(99)).__next__
        )
        events = await ask(session, "2 + 2?")
        begun = [event.node.role for event in events if isinstance(event, Begun)]
        assert begun == ["user", "assistant"]
        answer = session.tree.path()[-1]
        assert (answer.text, answer.thought, answer.finish, answer.model) == ("Four.", "hm", "stop", "smollm2")
        assert answer.thought_s == 1
        assert answer.figures is not None
        assert answer.figures["figures"]["context_used"] == 448
        assert isinstance(events[-1], Ended)
        assert session.state is State.READY

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_question_without_a_word_of_an_answer_is_not_shown_and_not_lost() -> None:
    async def run() -> None:
        backend = FakeBackend(
            [Text("", "one"), FIGURES], [Failed("", "ContextError", "too long")], [Text("", "3"), FIGURES]
        )
        session = await ready(backend)
        await ask(session, "a")
        events = await ask(session, "b")
        assert isinstance(events[-1], Rewound)
        assert said(session) == ["a", "one"]
        assert len(session.tree) == 4
        await ask(session, "c")
        assert [message["content"] for message in backend.asked[2]] == ["a", "one", "c"]

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_another_answer_is_a_branch_beside_the_first() -> None:
    async def run() -> None:
        backend = FakeBackend([Text("", "one"), FIGURES], [Text("", "two"), FIGURES])
        session = await ready(backend)
        await ask(session, "a")
        question, first = session.tree.path()
        events = await play(session.answer(question.id))
        assert isinstance(events[0], Rewound)
        assert said(session) == ["a", "two"]
        assert [message["content"] for message in backend.asked[1]] == ["a"]
        assert session.talk.switch(session.tree.path()[-1].id, 1)
        assert session.tree.head == first.id

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_another_answer_that_fails_leaves_the_first_shown() -> None:
    async def run() -> None:
        session = await ready(FakeBackend([Text("", "one"), FIGURES], [GONE]))
        await ask(session, "a")
        await play(session.answer(session.tree.path()[0].id))
        assert said(session) == ["a", "one"]
        assert session.state is State.ASLEEP

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_an_edited_question_is_asked_in_its_place_and_both_stay() -> None:
    async def run() -> None:
        backend = FakeBackend([Text("", "one"), FIGURES], [Text("", "two"), FIGURES], [Text("", "other"), FIGURES])
        session = await ready(backend)
        await ask(session, "a")
        await ask(session, "b")
        await play(session.ask_instead(session.tree.path()[0].id, "z"))
        assert said(session) == ["z", "other"]
        assert [message["content"] for message in backend.asked[2]] == ["z"]
        session.talk.switch(session.tree.path()[0].id, 1)
        assert said(session) == ["a", "one", "b", "two"]

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_an_edited_answer_is_what_the_model_sees() -> None:
    async def run() -> None:
        backend = FakeBackend([Text("", "one"), FIGURES])
        session = await ready(backend)
        await ask(session, "a")
        session.edit_answer(session.tree.path()[1].id, "uno")
        await ask(session, "b")
        assert [message["content"] for message in backend.asked[1]] == ["a", "uno", "b"]

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_an_answer_goes_on_where_it_was_stopped() -> None:
    async def run() -> None:
        backend = FakeBackend([Text("", "one "), HOLD, FIGURES], [Text("", "two"), FIGURES])
        session = await ready(backend)
        async with aclosing(session.ask(Node("user", "a"))) as events:
            async for event in events:
                if isinstance(event, Text):
                    session.stop()
        answer = session.tree.path()[-1]
        assert (answer.text, answer.finish) == ("one ", "cancelled")
        await play(session.go_on(answer.id))
        assert (answer.text, answer.finish) == ("one two", "stop")
        assert backend.continued == [False, True]
        assert backend.asked[1][-1] == {"role": "assistant", "content": "one "}

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_thought_that_was_cut_goes_on() -> None:
    async def run() -> None:
        backend = FakeBackend([Thought("", "second"), Text("", "x"), FIGURES])
        session = await ready(backend)
        node = session.talk.add(Node("user", "a"), "m", None)
        cut = session.talk.add(Node("assistant", parent=node.id, thought="first ", finish="length"), "m", None)
        await play(session.go_on(cut.id))
        assert backend.asked[0][-1] == {"role": "assistant", "content": "", "thought": "first "}
        assert (cut.thought, cut.text) == ("first second", "x")

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_what_comes_after_a_stop_is_not_kept() -> None:
    async def run() -> None:
        class Late(FakeBackend):
            def cancel(self) -> None:
                self.cancel_count += 1

        session = await ready(Late([Text("", "kept"), *words(" not kept"), Done("", "cancelled")]))
        async with aclosing(session.ask(Node("user", "a"))) as events:
            async for event in events:
                if isinstance(event, Text):
                    session.stop()
        assert said(session) == ["a", "kept"]
        assert session.state is State.READY

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_an_answer_goes_on_into_its_own_conversation_after_another_has_begun() -> None:
    async def run() -> None:
        session = await ready(FakeBackend([Text("", "one"), HOLD, Text("", " more"), FIGURES]))
        old = session.talk
        async with aclosing(session.ask(Node("user", "a"))) as events:
            async for event in events:
                if isinstance(event, Text) and session.talk is old:
                    session.restart()
                    session.backend.release()  # type: ignore[attr-defined]
        assert [node.text for node in old.tree.path()] == ["a", "one more"]
        assert len(session.tree) == 0

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_what_is_said_is_recorded_as_it_comes(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store.open(tmp_path / "c.db")
        recorder = Recorder(store, lambda reason: None)
        backend = FakeBackend([Thought("", "hm"), *words("first half"), HOLD, *words(" second"), FIGURES])
        session = await ready(backend, recorder=recorder, settings=Settings("be brief"))
        async with aclosing(session.ask(Node("user", "a"))) as events:
            async for _ in events:
                if session.tree.path()[-1].text == "first half":
                    await recorder.settled()
                    assert session.talk.id is not None
                    stored = store.load(session.talk.id)
                    assert [node.text for node in stored.tree.path()] == ["a", "first half"]
                    assert stored.tree.path()[1].finish is None
                    backend.release()
        await recorder.settled()
        stored = store.load(session.talk.id)
        answer = stored.tree.path()[-1]
        assert (answer.text, answer.thought, answer.finish) == ("first half second", "hm", "stop")
        assert stored.settings == Settings("be brief")
        assert store.history() == ["a"]
        await recorder.close()

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_conversation_is_gone_on_with_from_the_store(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store.open(tmp_path / "c.db")
        recorder = Recorder(store, lambda reason: None)
        first = await ready(FakeBackend([Text("", "one"), FIGURES]), recorder=recorder)
        await ask(first, "a")
        await recorder.settled()
        assert first.talk.id is not None
        backend = FakeBackend([Text("", "two"), FIGURES])
        second = await ready(backend, recorder=recorder)
        second.open(store.load(first.talk.id))
        await ask(second, "b")
        assert [message["content"] for message in backend.asked[0]] == ["a", "one", "b"]
        await recorder.settled()
        assert len(store.load(first.talk.id).tree) == 4
        await recorder.close()

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_store_that_cannot_write_is_said_once_and_the_conversation_goes_on() -> None:
    async def run() -> None:
        class Full:
            read_only = False

            def __getattr__(self, name: str) -> Any:
                def refuse(*arguments: Any, **named: Any) -> None:
                    raise OSError("no space left on device")

                return refuse

        complaints: list[str] = []
        recorder = Recorder(Full(), complaints.append)  # type: ignore[arg-type]
        session = await ready(FakeBackend([Text("", "one"), FIGURES]), recorder=recorder)
        await ask(session, "a")
        await ask(session, "b")
        await recorder.settled()
        await asyncio.sleep(0)
        assert len(complaints) == 1
        assert "no space left" in complaints[0]
        assert said(session) == ["a", "one", "b", "one"]

    asyncio.run(asyncio.wait_for(run(), timeout=90))


class OneTool:
    """A toolbox with a tool that adds."""

    tool = Tool("add", "Adds.", {"type": "object"}, "python:here")

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def ready(self, off: Any = ()) -> tuple[Tool, ...]:
        return self.list(off)

    def list(self, off: Any = ()) -> tuple[Tool, ...]:
        return () if self.tool.origin in off else (self.tool,)

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        self.calls.append(arguments)
        return Result("4")


CALLING: list[Step] = [ToolCall("", "add", {"a": 2, "b": 2}, "c1"), Done("", "tools")]


def test_a_tool_that_is_allowed_runs_and_its_result_is_answered() -> None:
    async def run() -> None:
        async def yes(call: object, tool: object) -> bool:
            return True

        backend, tools = FakeBackend(CALLING, [Text("", "Four."), FIGURES]), OneTool()
        session = await ready(backend, tools=tools, approve=yes)
        await ask(session, "2 + 2?")
        assert tools.calls == [{"a": 2, "b": 2}]
        assert [(node.role, node.text) for node in session.tree.path()] == [
            ("user", "2 + 2?"),
            ("assistant", ""),
            ("tool", "4"),
            ("assistant", "Four."),
        ]
        assert backend.tools[0][0]["function"]["name"] == "add"
        assert backend.asked[1][-1]["tool_call_id"] == "c1"
        assert (
            backend.asked[1] == session.tree.messages(to=session.tree.path()[2].id)
            or backend.asked[1][-1]["content"] == "4"
        )

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_tool_never_runs_without_a_word_of_the_user() -> None:
    async def run() -> None:
        tools = OneTool()
        session = await ready(FakeBackend(CALLING, [Text("", "I may not."), FIGURES]), tools=tools)
        await ask(session, "2 + 2?")
        assert tools.calls == []
        assert "did not allow" in session.tree.path()[2].text
        assert said(session)[-1] == "I may not."

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_what_is_switched_off_is_off_until_the_conversation_is_left(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store.open(tmp_path / "c.db")
        recorder = Recorder(store, lambda reason: None)
        backend = FakeBackend([Text("", "one"), FIGURES])
        session = await ready(backend, tools=OneTool(), recorder=recorder)

        async def offered(words: str) -> int:
            await ask(session, words)
            return len(backend.tools[-1])

        session.off = {OneTool.tool.origin}
        assert await offered("a") == 0
        await recorder.settled()
        first = session.talk.id or ""
        session.open(store.load(first))
        assert await offered("b") == 0, "it is the same conversation"
        session.restart()
        assert await offered("c") == 1
        session.off = {OneTool.tool.origin}
        await recorder.settled()
        session.open(store.load(first))
        assert await offered("d") == 1

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_title_is_asked_for_and_gives_way_to_a_question(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store.open(tmp_path / "c.db")
        recorder = Recorder(store, lambda reason: None)
        backend = FakeBackend(
            [Text("", "Four."), FIGURES],
            [Text("", '"Title: '), HOLD, FIGURES],
            [Text("", "Six."), FIGURES],
            [Text("", '**Sums of "small" numbers**\nmore'), FIGURES],
        )
        session = await ready(backend, recorder=recorder)
        await ask(session, "2 + 2?")
        naming = asyncio.create_task(session.name())
        await asyncio.sleep(0.05)
        await ask(session, "3 + 3?")
        assert await naming is None
        assert session.talk.title is None
        assert await session.name() == 'Sums of "small" numbers'
        await recorder.settled()
        assert [each.title for each in store.list()] == ['Sums of "small" numbers']
        assert said(session) == ["2 + 2?", "Four.", "3 + 3?", "Six."]
        await recorder.close()

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_a_title_is_made_presentable() -> None:
    tree = Tree()
    tree.add(Node("user", "What do cats\nsay when " + "they are hungry " * 9))
    assert tidy("## Title: *What cats say*", tree) == "What cats say"
    assert tidy("Two hungry cats", tree) == "Two hungry cats"
    echoes = ("The conversation in two to six words", "Name: conversation", "Six words: Name This")
    for nothing in ("", "\n***\n", "the cat, " * 20, *echoes):
        assert tidy(nothing, tree) == "What do cats say when they are hungry they are hungry they…"
    tree.add(Node("user", "Give me six words for conversation"))
    assert tidy("Six words for conversation", tree) == "Six words for conversation"


def test_another_model_answers_in_the_middle_of_a_conversation() -> None:
    async def run() -> None:
        backend = FakeBackend([Text("", "one"), FIGURES], [Text("", "two"), FIGURES])
        session = await ready(backend)
        await ask(session, "a")
        session.choose("other", Path("/models/other"))
        assert session.state is State.ASLEEP
        await play(session.load())
        await ask(session, "b")
        assert backend.chosen == [("other", Path("/models/other"), None)]
        assert [message["content"] for message in backend.asked[1]] == ["a", "one", "b"]
        assert session.tree.path()[-1].model == "other"

    asyncio.run(asyncio.wait_for(run(), timeout=90))
