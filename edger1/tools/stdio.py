"""A tool server as a child process that speaks JSON-RPC, a message a line, over its standard input and output.

Beside the transport in `mcp` this one holds a message to a size, writes what is no message into the server's log and
nowhere else, knows how the server ended, and leaves no process behind (see `guard`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1.tools.logs import ServerLog
from edger1.tools.settings import ServerSettings

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream
    from mcp.shared.message import SessionMessage

MESSAGE_MAX = 16 * 2**20
"""Bytes of one message; a server that sends a longer one is ended."""
PATIENCE_S = 1.0
"""For a server to end by itself after its input is closed, and again after SIGTERM."""
JUNK_SHOWN = 300


class StdioServer:
    """Starts a server for `streams`, and tells afterwards how it ended."""

    def __init__(self, settings: ServerSettings, log: ServerLog) -> None:
        self._settings = settings
        self._log = log
        self.ended = asyncio.Event()
        """Set when the server sends nothing any more."""
        self.why: str | None = None
        """How it ended, as the rest of a sentence; None while it runs."""

    @contextlib.asynccontextmanager
    async def streams(self) -> AsyncIterator[tuple[Any, Any]]:
        """Run the server and yield what `mcp.Client` takes as a transport's streams."""
        import anyio

        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            process = await self._start(theirs.fileno())
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        to_session, incoming = anyio.create_memory_object_stream[Any](0)
        outgoing, from_session = anyio.create_memory_object_stream[Any](0)
        # Plain tasks and no task group: a cancelled scope must not cut the ending of the server short.
        tasks = [
            asyncio.create_task(self._read(process, to_session, ours)),
            asyncio.create_task(self._write(process, from_session)),
            asyncio.create_task(self._copy_stderr(process)),
        ]
        try:
            yield incoming, outgoing
        finally:
            await _end(process)
            ours.close()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            # A grandchild that holds a pipe would keep it open, and asyncio complain about it at the end.
            transport = getattr(process, "_transport", None)
            if transport is not None:
                transport.close()
            for stream in (to_session, incoming, outgoing, from_session):
                stream.close()

    async def _start(self, life: int) -> asyncio.subprocess.Process:
        from mcp.client.stdio import get_default_environment

        settings = self._settings
        guard = Path(__file__).with_name("guard.py")
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(guard), str(life), str(settings.command), *settings.args),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**get_default_environment(), **settings.env},
            cwd=settings.cwd,
            limit=MESSAGE_MAX,
            start_new_session=True,
            pass_fds=(life,),
        )

    async def _read(
        self, process: asyncio.subprocess.Process, to_session: MemoryObjectSendStream[Any], life: socket.socket
    ) -> None:
        from mcp.shared.message import SessionMessage
        from mcp_types import jsonrpc_message_adapter

        assert process.stdout is not None
        try:
            while True:
                try:
                    line = await process.stdout.readline()
                except ValueError:
                    self.why = f"sent a message of more than {MESSAGE_MAX // 2**20} MiB and was ended"
                    break
                if not line:
                    self.why = await _how_it_ended(life)
                    break
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError:
                    if line.strip():
                        self._log.write(b"[edger1] not a message: " + line[:JUNK_SHOWN].rstrip() + b"\n")
                    continue
                await to_session.send(SessionMessage(message))
        except (OSError, _closed()):
            self.why = self.why or "closed its output"
        finally:
            self.ended.set()
            to_session.close()

    async def _write(
        self, process: asyncio.subprocess.Process, from_session: MemoryObjectReceiveStream[SessionMessage]
    ) -> None:
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            async for each in from_session:
                process.stdin.write(each.message.model_dump_json(by_alias=True, exclude_unset=True).encode() + b"\n")
                await process.stdin.drain()

    async def _copy_stderr(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        with contextlib.suppress(OSError):
            while said := await process.stderr.read(65_536):
                self._log.write(said)


def _closed() -> type[Exception]:
    import anyio

    return anyio.BrokenResourceError


async def _how_it_ended(life: socket.socket) -> str:
    """Return what the guard has to say, which it sends before its output closes."""
    try:
        said = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(life, 500), 0.5)
    except (OSError, TimeoutError):
        said = b""
    return said.decode(errors="replace") or "closed its output"


async def _end(process: asyncio.subprocess.Process) -> None:
    """Close the server's input, wait a little, then end its process group."""
    if process.stdin is not None:
        process.stdin.close()
    for each in (None, signal.SIGTERM, signal.SIGKILL):
        if process.returncode is not None:
            return
        if each is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, each)
        # Not process.wait(), which also waits for pipes that a grandchild may hold.
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while process.returncode is None and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.01)
