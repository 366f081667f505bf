"""Tool servers: real ones of the SDK over stdio and HTTP, and hostile ones."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from children import child, until

from edger1.tools.settings import ServerSettings, ToolSettings
from edger1.tools.toolbox import Toolbox

HERE = Path(__file__).parent
REAL = str(HERE / "tool_server.py")
HOSTILE = str(HERE / "hostile_tool_server.py")


def settings(*args: str, name: str = "test", call_s: float = 20.0, start_s: float = 60.0) -> ServerSettings:
    return ServerSettings(name, sys.executable, args, start_timeout_s=start_s, call_timeout_s=call_s)


def hostile(how: str, call_s: float = 20.0, start_s: float = 60.0) -> ServerSettings:
    return settings(HOSTILE, how, call_s=call_s, start_s=start_s)


def use(folder: Path, scenario: Callable[[Toolbox], Awaitable[None]], *servers: ServerSettings) -> Toolbox:
    """Run a scenario with servers that are closed after it, whatever happens."""
    box = Toolbox(ToolSettings(servers), logs=folder)

    async def run() -> None:
        try:
            await scenario(box)
        finally:
            await box.close()

    asyncio.run(asyncio.wait_for(run(), timeout=150))
    return box


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def gone(pid: int, within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


def test_a_real_server(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        assert box.list() == ()
        assert [view.state for view in box.servers()] == ["idle"]
        tools = {tool.name: tool for tool in await box.ready()}
        assert set(tools) == {"add", "shout", "fail", "wait", "picture", "much", "die", "number"}
        assert tools["add"].description == "Add two numbers."
        assert tools["add"].schema["properties"]["a"]["type"] == "integer"
        assert tools["add"].origin == "mcp:test"
        assert tools["add"].to_openai()["function"]["name"] == "add"
        assert "test__add" not in tools

        added = await box.call("add", {"a": 2, "b": 3})
        assert (added.text, added.is_error, added.cut) == ("5", False, False)
        assert (await box.call("test__add", {"a": 2, "b": 3})).text == "5"
        assert (await box.call("shout", {"text": "hi", "how": "louder"})).text == "HI!!"
        wrong = await box.call("add", {"a": "x", "b": 3})
        assert wrong.is_error
        assert "integer" in wrong.text
        broken = await box.call("fail", {})
        assert broken.is_error
        assert "it is broken" in broken.text
        drawn = await box.call("picture", {})
        assert drawn.text == "[image: image/png, 300 kB; not shown to the model]"
        much = await box.call("much", {"size": 3_000_000})
        assert much.cut
        assert len(much.text) < 21_000
        assert much.text.endswith("[Cut: these are the first 20,000 of 3,000,000 characters.]")

        both = await asyncio.gather(box.call("wait", {"seconds": 1.5}), box.call("add", {"a": 1, "b": 1}))
        assert [each.text for each in both] == ["waited", "2"]
        assert both[0].seconds >= 1.5
        assert both[1].seconds < both[0].seconds
        assert "shouting" in box.log("mcp:test")

    use(tmp_path, scenario, settings(REAL))


def test_a_server_that_dies_is_told_and_started_again(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        await box.ready()
        died = await box.call("die", {"code": 7})
        assert died.is_error
        assert "exit code 7" in died.text
        assert box.servers()[0].state == "ended"
        assert "exit code 7" in box.servers()[0].trouble
        assert (await box.call("add", {"a": 1, "b": 1})).text == "2"

    use(tmp_path, scenario, settings(REAL))


def test_a_late_call_is_given_up_and_the_server_lives_on(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        await box.ready()
        begun = time.monotonic()
        late = await box.call("wait", {"seconds": 60})
        assert late.is_error
        assert "no answer within 4 s" in late.text
        assert time.monotonic() - begun < 30
        assert (await box.call("add", {"a": 1, "b": 1})).text == "2"

    use(tmp_path, scenario, settings(REAL, call_s=4.0))


def test_a_cancelled_call_ends_at_once(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        await box.ready()
        call = asyncio.create_task(box.call("wait", {"seconds": 60}))
        await asyncio.sleep(0.3)
        begun = time.monotonic()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # Neither the server's answer nor the time that it has for one was waited for.
        assert time.monotonic() - begun < 15
        assert (await box.call("add", {"a": 1, "b": 1})).text == "2"

    use(tmp_path, scenario, settings(REAL, call_s=40.0))


def test_names_are_unique_and_none_takes_anothers_place(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        names = [tool.name for tool in await box.ready()]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in names)
        assert {"test__add", "evil__add", "a_b___31mc", "n" * 64} <= set(names)
        assert "add" not in names
        assert "no tool 'add'" in (await box.call("add", {"a": 1, "b": 1})).text
        assert (await box.call("test__add", {"a": 1, "b": 1})).text == "2"
        assert [tool.origin for tool in box.list(off={"mcp:evil"}) if tool.own_name == "add"] == ["mcp:test"]
        assert len(box.list(off={"mcp:test/add"})) == len(names) - 1

    use(tmp_path, scenario, settings(REAL), settings(HOSTILE, "names", name="evil"))


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("silent", "not ready within 2 s"),
        ("crash", "ended with exit code 3"),
        ("flood", "more than 16 MiB"),
    ],
)
def test_a_server_that_never_gets_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, why: str) -> None:
    create, started = asyncio.create_subprocess_exec, 0

    async def counted(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        nonlocal started
        started += 1
        return await create(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", counted)

    async def scenario(box: Toolbox) -> None:
        await asyncio.to_thread(__import__, "mcp")
        begun = time.monotonic()
        assert await box.ready() == ()
        view = box.servers()[0]
        assert view.state == "failed"
        assert why in view.trouble
        assert time.monotonic() - begun < 50
        assert started == 1
        await box.ready()
        assert started == 1
        if how == "crash":
            assert "no such database" in box.log("mcp:test")
        await box.restart("mcp:test")
        assert started == 2
        assert box.servers()[0].state == "failed"

    use(tmp_path, scenario, hostile(how, start_s=2.0 if how == "silent" else 60.0))


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        assert await box.ready() == ()
        assert "could not be started: No such file" in box.servers()[0].trouble
        no_tool = await box.call("one", {})
        assert no_tool.is_error

    use(tmp_path, scenario, ServerSettings("test", "/no/such/program"))


@pytest.mark.parametrize(
    ("how", "result"),
    [
        ("junk", "one"),
        ("noisy", "one"),
        ("fat", "one"),
        ("long", "one"),
        ("hang", "no answer within 2 s"),
        ("wrong", "failed"),
        ("megabytes", "first 20,000 of 5,000,000"),
        ("endless line", "more than 16 MiB"),
    ],
)
def test_hostile_servers_end_in_a_result(tmp_path: Path, how: str, result: str) -> None:
    async def scenario(box: Toolbox) -> None:
        tools = await box.ready()
        assert [tool.name for tool in tools] == ["one"], box.servers()
        assert len(tools[0].description) <= 4_000
        got = await box.call("one", {})
        assert result in got.text
        assert len(got.text) < 21_000
        if how == "junk":
            assert "not a message: Welcome" in box.log("mcp:test")
        if how == "fat":
            assert "1 tools are left out" in box.servers()[0].notes[0]

    use(tmp_path, scenario, hostile(how, call_s=2.0 if how == "hang" else 30.0))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 1_200_000


def test_thousands_of_tools_are_cut_and_said(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        assert len(await box.ready()) == 128
        assert box.servers()[0].notes == ("It lists 5,000 tools; the first 128 are offered.",)

    use(tmp_path, scenario, hostile("thousands"))


def test_a_list_without_an_end(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        assert len(await box.ready()) == 100

    use(tmp_path, scenario, hostile("endless"))


@pytest.mark.parametrize("how", ["stubborn", "family"])
def test_no_process_is_left_after_closing(tmp_path: Path, how: str) -> None:
    async def scenario(box: Toolbox) -> None:
        await box.ready()

    box = use(tmp_path, scenario, hostile(how))
    pids = [int(pid) for pid in re.findall(r"(?:pid|child) (\d+)", box.log("mcp:test"))]
    assert len(pids) == (2 if how == "family" else 1)
    assert all(gone(pid) for pid in pids)


def own_children() -> set[int]:
    """Return the ids of the processes that this thread has started."""
    return {int(pid) for pid in Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()}


def test_closing_while_a_server_is_starting(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        await asyncio.to_thread(__import__, "mcp")
        before = own_children()
        starting = asyncio.create_task(box.ready())
        deadline = time.monotonic() + 60
        while not (started := own_children() - before):
            assert not starting.done(), box.servers()
            assert time.monotonic() < deadline, "no server was started"
            await asyncio.sleep(0.02)
        begun = time.monotonic()
        await box.close()
        # The minute that the server has to get ready in was not waited for.
        assert time.monotonic() - begun < 30
        assert all(gone(pid) for pid in started)
        assert await asyncio.wait_for(starting, 60) == ()

    use(tmp_path, scenario, hostile("silent"))


@pytest.mark.parametrize("how", ["plain", "family"])
def test_no_process_is_left_when_the_program_is_killed(tmp_path: Path, how: str) -> None:
    program = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(HERE)!r})
from test_tools_servers import Toolbox, ToolSettings, hostile
async def main():
    box = Toolbox(ToolSettings((hostile({how!r}),)), logs=Path({str(tmp_path)!r}))
    print(len(await box.ready()), flush=True)
    await asyncio.sleep(100)
asyncio.run(main())
"""
    with child([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        log = (tmp_path / "mcp-test.log").read_text()
        pids = [int(pid) for pid in re.findall(r"(?:pid|child) (\d+)", log)]
        assert pids
        assert all(alive(pid) for pid in pids)
        process.send_signal(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


@contextlib.contextmanager
def http_server() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=10):
            return True
        return False

    with child([sys.executable, REAL, str(port)], limit_s=240, stderr=subprocess.DEVNULL) as process:
        until(answers, "a server that listens", process)
        yield f"http://127.0.0.1:{port}/mcp"


def test_a_server_over_http(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        tools = await box.ready()
        assert "add" in {tool.name for tool in tools}, box.servers()
        assert (await box.call("add", {"a": 2, "b": 3})).text == "5"
        assert "more than 16 MiB" in (await box.call("much", {"size": 20_000_000})).text
        pid = int((await box.call("number", {})).text)
        os.kill(pid, signal.SIGKILL)
        lost = await box.call("add", {"a": 2, "b": 3})
        assert lost.is_error

    with http_server() as url:
        use(tmp_path, scenario, ServerSettings("test", url=url, start_timeout_s=60, call_timeout_s=20))


def test_an_address_where_nobody_is(tmp_path: Path) -> None:
    async def scenario(box: Toolbox) -> None:
        assert await box.ready() == ()
        assert box.servers()[0].state == "failed"
        assert "Connect" in box.servers()[0].trouble

    use(tmp_path, scenario, ServerSettings("test", url="http://127.0.0.1:9/mcp"))
