"""Plain Python functions as tools: their schemas, the check of their arguments, and their ends."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from edger1.errors import UsageError
from edger1.tools import Result, Toolbox, ToolSettings, function_tool
from edger1.tools.functions import read_docstring


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Point:
    x: float
    y: float = 0.0


class Person(BaseModel):
    name: str
    age: int | None = None


def everything(
    text: str,
    colour: Colour,
    how: Literal["up", "down"] = "up",
    many: list[int] | None = None,
    table: dict[str, float] = {},  # noqa: B006
    point: Point = Point(1.0),  # noqa: B008
    person: Person | None = None,
    json: Annotated[bool, "as JSON"] = False,
    size: Annotated[int, Field(ge=1, description="how large")] = 1,
    *,
    _last: Any = None,
) -> str:
    """Do everything.

    All of it.

    Args:
        text: what to say
            over two lines
        colour (Colour): in which colour

    Returns:
        What it got.
    """
    return f"{text} {colour} {how} {many} {table} {point} {person} {json} {size} {_last}"


def call(tool: Any, arguments: dict[str, Any], timeout_s: float = 10.0) -> Result:
    return asyncio.run(function_tool(tool).call(arguments, timeout_s=timeout_s))


def test_the_schema_comes_from_the_signature() -> None:
    made = function_tool(everything).tool
    assert made.name == "everything"
    assert made.description == "Do everything.\n\nAll of it."
    assert made.schema["required"] == ["text", "colour"]
    assert made.schema["additionalProperties"] is False
    properties = made.schema["properties"]
    assert properties["text"] == {"type": "string", "description": "what to say over two lines"}
    assert properties["how"] == {"type": "string", "enum": ["up", "down"], "default": "up"}
    assert properties["many"]["anyOf"] == [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]
    assert properties["table"]["additionalProperties"] == {"type": "number"}
    assert properties["json"] == {"type": "boolean", "default": False, "description": "as JSON"}
    assert properties["size"] == {"type": "integer", "minimum": 1, "default": 1, "description": "how large"}
    assert made.schema["$defs"]["Colour"]["enum"] == ["red", "blue"]
    assert made.schema["$defs"]["Point"]["required"] == ["x"]
    assert "in which colour" in str(properties["colour"])
    assert "_last" in properties


def test_arguments_arrive_as_what_they_are_annotated_as() -> None:
    got = call(everything, {"text": "hi", "colour": "blue", "point": {"x": 3}, "person": {"name": "Ada"}, "many": [1]})
    assert got.text == "hi Colour.BLUE up [1] {} Point(x=3.0, y=0.0) name='Ada' age=None False 1 None"
    assert not got.is_error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"colour": "red"}, "- text: Field required"),
        ({"text": "a", "colour": "green"}, "- colour: Input should be 'red' or 'blue'"),
        ({"text": "a", "colour": "red", "colur": 1}, "- colur: Extra inputs are not permitted"),
        ({"text": "a", "colour": "red", "size": 0}, "- size: Input should be greater than or equal to 1"),
        ({"text": "a", "colour": "red", "point": {"x": "far"}}, "- point.x: Input should be a valid number"),
    ],
)
def test_wrong_arguments_are_told_and_nothing_is_called(arguments: dict[str, Any], said: str) -> None:
    got = call(everything, arguments)
    assert got.is_error
    assert said in got.text
    assert '"properties"' in got.text


def test_what_a_function_raises_is_a_result() -> None:
    def broken(why: str) -> None:
        raise KeyError(why)

    def leaves() -> None:
        raise SystemExit(3)

    assert call(broken, {"why": "lost"}).text == "KeyError: 'lost'"
    assert call(broken, {"why": "lost"}).is_error
    assert call(leaves, {}).text == "SystemExit: 3"


def test_values_become_text() -> None:
    def table() -> dict[str, Any]:
        return {"a": [1, Point(1, 2)], "ä": None}

    def nothing() -> None:
        pass

    async def later() -> str:
        await asyncio.sleep(0.01)
        return "later"

    assert call(table, {}).text == '{"a":[1,{"x":1,"y":2}],"ä":null}'
    assert call(nothing, {}).text == "Done; nothing was returned."
    assert call(later, {}).text == "later"


def test_a_function_that_never_returns_is_given_up_and_ended() -> None:
    running = threading.Event()

    def forever() -> None:
        running.set()
        while True:
            try:
                time.sleep(0.01)
            except Exception:
                continue

    async def both() -> tuple[Result, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += running.is_set()

        other = asyncio.create_task(tick())
        result = await function_tool(forever).call({}, timeout_s=1.5)
        other.cancel()
        return result, ticks

    result, ticks = asyncio.run(asyncio.wait_for(both(), timeout=90))
    assert result.is_error
    assert "did not return within 1.5 s" in result.text
    assert ticks > 5, "the loop stood still"
    assert ended("forever")


def test_a_cancelled_call_ends_its_thread() -> None:
    def busy() -> None:
        while True:
            pass

    async def stopped() -> None:
        task = asyncio.create_task(function_tool(busy).call({}))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(asyncio.wait_for(stopped(), timeout=90))
    assert ended("busy")


def test_a_call_that_is_given_up_while_it_imports_leaves_the_module_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end waits for the import's: a thread that ended inside would hold the module's lock for ever."""
    module = tmp_path / "slow_module_of_a_tool.py"
    module.write_text("import time\nfor _ in range(150):\n    time.sleep(0.01)\nvalue = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def imports() -> int:
        import slow_module_of_a_tool  # type: ignore[import-not-found]

        time.sleep(0)
        while True:
            time.sleep(0.01)
        return slow_module_of_a_tool.value

    result = asyncio.run(function_tool(imports).call({}, timeout_s=0.3))
    assert result.is_error
    assert ended("imports", 20)
    assert importlib.import_module("slow_module_of_a_tool").value == 7
    assert sys.modules.pop("slow_module_of_a_tool").value == 7


def ended(name: str, seconds: float = 3) -> bool:
    for _ in range(int(seconds * 100)):
        if not any(thread.name.endswith(name) for thread in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


def test_too_many_that_never_return() -> None:
    stop = threading.Event()

    def stuck() -> None:
        stop.wait(60)

    async def calls() -> list[Result]:
        made = function_tool(stuck)
        return [await made.call({}, timeout_s=0.05) for _ in range(6)]

    try:
        results = asyncio.run(asyncio.wait_for(calls(), timeout=90))
    finally:
        stop.set()
    assert "5 earlier calls of stuck are still running" in results[-1].text


def test_what_cannot_be_a_tool() -> None:
    def spread(*words: str) -> None: ...

    def positional(word: str, /) -> None: ...

    def strange(sock: threading.Event) -> None: ...

    for each, why in ((spread, "words"), (positional, "by name"), (strange, "Annotate its arguments")):
        with pytest.raises(UsageError, match=why):
            function_tool(each)
    with pytest.raises(UsageError, match="plain name"):
        function_tool(lambda: 1)


def test_docstrings() -> None:
    assert read_docstring("") == ("", {})
    assert read_docstring("One.\n\n:param int a: the a\n:param b: the b\n    of two\n:returns: c") == (
        "One.",
        {"a": "the a", "b": "the b of two"},
    )


def test_files_of_functions(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from pathlib import Path\n"
        "@dataclass\nclass P:\n    x: int\n"
        "def double(p: P) -> int:\n    'Twice.'\n    return 2 * p.x\n"
        "def _hidden(): ...\n"
    )
    (tmp_path / "bad.py").write_text("x = 1\nraise RuntimeError('no')\n")
    (tmp_path / "syntax.py").write_text("x = 1\n\ndef (:\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    files = [tmp_path / f"{name}.py" for name in ("good", "bad", "syntax", "empty", "missing")]

    def here() -> str:
        """Say where."""
        return "here"

    async def run() -> None:
        box = Toolbox(ToolSettings(functions=tuple(files)), [here], logs=tmp_path)
        assert [tool.name for tool in box.list()] == ["here"]
        assert {tool.name for tool in await box.ready()} == {"here", "double"}
        assert (await box.call("double", {"p": {"x": 4}})).text == "8"
        assert (await box.call("here", {})).text == "here"
        assert (await box.call("here", "no")).is_error
        states = {view.name: (view.state, view.trouble) for view in box.servers()}
        assert states["good.py"] == ("ready", "")
        assert states["bad.py"][0] == "failed"
        assert "failed in line 2: RuntimeError: no" in states["bad.py"][1]
        assert "failed in line 3: SyntaxError" in states["syntax.py"][1]
        assert "no public function" in states["empty.py"][1]
        assert "is no file" in states["missing.py"][1]
        (tmp_path / "bad.py").write_text("def mended(): return 'yes'\n")
        await box.restart(f"python:{tmp_path / 'bad.py'}")
        assert (await box.call("mended", {})).text == "yes"

    asyncio.run(asyncio.wait_for(run(), timeout=90))
