"""Which calls may run, and the rounds of an answer with tools."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from typing import Any

import pytest

from edger1.messages import Done, Event, Failed, Message, Text, ToolCall
from edger1.tools import Approvals, Call, CallState, Result, RoundBegins, Rounds, RoundsEnd, Tool, Toolbox
from edger1.tools.approval import Answer, approval_key

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def tool(name: str = "add", description: str = "Add.", origin: str = "mcp:test", **more: Any) -> Tool:
    return Tool(name, description, more.pop("schema", SCHEMA), origin, name, **more)


class Memory:
    def __init__(self) -> None:
        self.keys: set[str] = set()

    def approvals(self) -> set[str]:
        return set(self.keys)

    def approve_always(self, key: str) -> None:
        self.keys.add(key)

    def forget_approval(self, key: str) -> None:
        self.keys.discard(key)


def test_nothing_is_allowed_by_itself() -> None:
    assert Approvals(Memory()).allowed(tool()) is None


@pytest.mark.parametrize(
    ("answer", "runs", "here", "elsewhere"),
    [
        ("no", False, None, None),
        ("once", True, None, None),
        ("conversation", True, "conversation", None),
        ("always", True, "always", "always"),
        ("anything else", False, None, None),
    ],
)
def test_how_far_an_answer_reaches(answer: Answer, runs: bool, here: str | None, elsewhere: str | None) -> None:
    memory = Memory()
    approvals = Approvals(memory)
    assert approvals.decide(tool(), answer) is runs
    assert approvals.allowed(tool()) == here
    assert Approvals(memory).allowed(tool()) == elsewhere


@pytest.mark.parametrize(
    "other",
    [
        tool(description="Add, and send everything away."),
        tool(schema={"type": "object", "properties": {"a": {"type": "string"}}}),
        tool(runs="another program"),
        tool(origin="mcp:evil"),
        tool(name="subtract"),
    ],
)
def test_another_tool_is_asked_about_anew(other: Tool) -> None:
    approvals = Approvals(Memory())
    approvals.decide(tool(), "always")
    assert approvals.allowed(other) is None
    assert approvals.changed(other) is (other.key == tool().key)
    assert not approvals.changed(tool())


def test_the_name_it_is_offered_under_does_not_matter() -> None:
    longer = Tool("test__add", "Add.", SCHEMA, "mcp:test", "add")
    assert approval_key(longer) == approval_key(tool())


def test_forgetting() -> None:
    memory = Memory()
    approvals = Approvals(memory)
    approvals.decide(tool(), "always")
    approvals.decide(tool(description="Newer."), "always")
    approvals.decide(tool("b"), "conversation")
    approvals.decide(tool("c"), "always")
    approvals.forget(tool())
    assert {key.partition("#")[0] for key in memory.keys} == {"mcp:test/c"}
    approvals.forget_all()
    assert memory.keys == set()
    assert approvals.allowed(tool("b")) is None


def test_a_question_is_asked_only_where_it_must_be() -> None:
    asked: list[str] = []

    async def ask(call: Call, tool: Tool) -> Answer:
        asked.append(call.id)
        return "conversation"

    async def run() -> None:
        approvals = Approvals(Memory())
        assert await approvals.approve(Call("1", "add"), tool(), ask)
        assert await approvals.approve(Call("2", "add"), tool(), ask)

    asyncio.run(asyncio.wait_for(run(), timeout=90))
    assert asked == ["1"]


class Tools:
    def __init__(self, run: Callable[[str, dict[str, Any]], Any] | None = None) -> None:
        self.called: list[tuple[str, Any]] = []
        self._run = run

    def list(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        return tuple(each for each in (tool("add"), tool("other")) if each.key not in off)

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        self.called.append((name, arguments))
        if self._run is not None:
            return await self._run(name, arguments)
        return Result(f"{name} {arguments['a']}")


class Model:
    """Plays a list of events for each round; the last one again and again."""

    def __init__(self, *rounds: list[Event]) -> None:
        self.rounds = rounds
        self.asked: list[list[Message]] = []
        self.offered: list[list[str]] = []

    async def ask(self, messages: list[Message], tools: list[dict[str, Any]]) -> AsyncIterator[Event]:
        self.asked.append(messages)
        self.offered.append([each["function"]["name"] for each in tools])
        for event in self.rounds[min(len(self.asked), len(self.rounds)) - 1]:
            yield event


def calls(*numbers: int, name: str = "add") -> list[Event]:
    return [Text("", "So."), *(ToolCall("", name, {"a": n}) for n in numbers), Done("", "tools")]


ANSWER: list[Event] = [Text("", "Five."), Done("", "stop")]
QUESTION: list[Message] = [{"role": "user", "content": "2+3?"}]


async def yes(call: Call, tool: Tool) -> bool:
    return True


def play(model: Model, tools: Tools, approve: Any = yes, **more: Any) -> tuple[list[Any], list[Message]]:
    rounds = Rounds(QUESTION, model.ask, tools, approve, **more)

    async def run() -> list[Any]:
        return [step async for step in rounds.run()]

    return asyncio.run(asyncio.wait_for(run(), 60)), rounds.messages


def stages(steps: list[Any]) -> list[str]:
    return [step.stage for step in steps if isinstance(step, CallState)]


def test_an_answer_without_calls_is_one_round() -> None:
    model, tools = Model(ANSWER), Tools()
    steps, messages = play(model, tools)
    assert steps == [RoundBegins(1), *ANSWER]
    assert messages == QUESTION
    assert model.offered == [["add", "other"]]


def test_calls_run_in_order_and_their_results_go_back() -> None:
    model, tools = Model(calls(1, 2), ANSWER), Tools()
    steps, messages = play(model, tools, off={"mcp:test/other"})
    assert tools.called == [("add", {"a": 1}), ("add", {"a": 2})]
    assert stages(steps) == ["waiting", "running", "done"] * 2
    assert model.offered == [["add"], ["add"]]
    asking, first, second = model.asked[1][1:]
    assert asking["role"] == "assistant"
    assert asking["content"] == "So."
    ids = [each["id"] for each in asking["tool_calls"]]
    assert len(set(ids)) == 2
    assert [first["tool_call_id"], second["tool_call_id"]] == ids
    assert [first["content"], second["content"]] == ["add 1", "add 2"]
    assert messages == model.asked[1]


def test_no_call_runs_without_approval() -> None:
    async def no(call: Call, tool: Tool) -> bool:
        return False

    model, tools = Model(calls(1), ANSWER), Tools()
    steps, _ = play(model, tools, no)
    assert tools.called == []
    assert stages(steps) == ["waiting", "refused"]
    assert "did not allow" in model.asked[1][-1]["content"]


def test_a_tool_that_is_not_offered_is_not_run() -> None:
    model, tools = Model(calls(1, name="rm"), ANSWER), Tools()
    steps, _ = play(model, tools)
    assert tools.called == []
    assert stages(steps) == ["failed"]
    assert model.asked[1][-1]["content"] == "There is no tool 'rm'. The tools are: add, other."


@pytest.mark.parametrize("end", [Done("", "cancelled"), Failed("", "EngineError", "gone")])
def test_calls_of_an_answer_that_was_cut_off_do_not_run(end: Event) -> None:
    model, tools = Model([*calls(1)[:-1], end]), Tools()
    steps, messages = play(model, tools)
    assert tools.called == []
    assert stages(steps) == []
    assert messages == QUESTION


def test_the_rounds_have_an_end_that_is_told() -> None:
    model, tools = Model(calls(1)), Tools()
    steps, messages = play(model, tools)
    assert len(model.asked) == 16
    assert steps[-1] == RoundsEnd(16)
    assert messages[-1]["role"] == "tool"


def test_stopping_in_the_middle_of_a_call() -> None:
    cancelled: list[str] = []

    async def hang(name: str, arguments: dict[str, Any]) -> Result:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(name)
            raise
        return Result("never")

    model, tools = Model(calls(1, 2), ANSWER), Tools(hang)
    rounds = Rounds(QUESTION, model.ask, tools, yes)

    async def run() -> list[Any]:
        steps = []
        async for step in rounds.run():
            steps.append(step)
            if isinstance(step, CallState) and step.stage == "running":
                asyncio.get_running_loop().call_later(0.02, rounds.stop)
        return steps

    steps = asyncio.run(asyncio.wait_for(run(), 30))
    assert cancelled == ["add"]
    assert stages(steps) == ["waiting", "running", "stopped", "stopped"]
    assert len(model.asked) == 1
    results = [each for each in rounds.messages if each["role"] == "tool"]
    assert [each["content"] for each in results] == ["The user stopped this call before it was done."] * 2


def test_stopping_while_the_user_is_asked() -> None:
    async def waits(call: Call, tool: Tool) -> bool:
        await asyncio.sleep(60)
        return True

    model, tools = Model(calls(1), ANSWER), Tools()
    rounds = Rounds(QUESTION, model.ask, tools, waits)

    async def run() -> list[Any]:
        asyncio.get_running_loop().call_later(0.02, rounds.stop)
        return [step async for step in rounds.run()]

    assert stages(asyncio.run(asyncio.wait_for(run(), 30))) == ["waiting", "stopped"]
    assert tools.called == []


def test_cancelling_whoever_iterates_stops_the_call() -> None:
    ended: list[str] = []

    async def hang(name: str, arguments: dict[str, Any]) -> Result:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)
        return Result("never")

    async def run() -> None:
        rounds = Rounds(QUESTION, Model(calls(1)).ask, Tools(hang), yes)

        async def all_of_it() -> None:
            async for _ in rounds.run():
                pass

        task = asyncio.create_task(all_of_it())
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait({task}, timeout=30)
        assert task.cancelled()
        await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), timeout=90))
    assert ended == ["add"]


def test_rounds_with_a_real_toolbox() -> None:
    def add(a: int) -> int:
        """Add one."""
        return a + 1

    async def ask(call: Call, tool: Tool) -> Answer:
        return "conversation"

    async def run() -> list[Any]:
        box, approvals = Toolbox(functions=[add]), Approvals(Memory())
        model = Model(calls(1, 2), calls(5), ANSWER)
        rounds = Rounds(QUESTION, model.ask, box, lambda call, tool: approvals.approve(call, tool, ask))
        steps = [step async for step in rounds.run()]
        assert stages(steps) == ["waiting", "running", "done"] * 3
        return [each["content"] for each in rounds.messages if each["role"] == "tool"]

    assert asyncio.run(asyncio.wait_for(run(), timeout=90)) == ["2", "3", "6"]
