"""One server of the Model Context Protocol: started when it is first needed, watched, asked, ended.

Whatever a server does comes to an end: it has `start_timeout_s` to be ready and `call_timeout_s` for each call; what it
lists and answers is held to a size. A server that ended is started again by the next call; one that never got ready
only when asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edger1 import __version__
from edger1.tools.content import read_result
from edger1.tools.kinds import RESULT_MAX, Result
from edger1.tools.logs import ServerLog
from edger1.tools.settings import ServerSettings
from edger1.tools.stdio import MESSAGE_MAX, StdioServer

if TYPE_CHECKING:
    from mcp import Client

State = Literal["idle", "starting", "ready", "failed", "ended"]
TOOLS_MAX = 128
"""Tools of one server that are offered: each takes of the context, and models lose their way among more."""
LISTED_MAX = 10_000
PAGES_MAX = 100
DESCRIPTION_MAX = 4_000
"""Characters of a description."""
SCHEMA_MAX = 32_000
"""Characters of a schema as JSON; a tool with a longer one is left out."""


@dataclass(frozen=True)
class Listed:
    """A tool as its server describes it."""

    name: str
    description: str
    schema: dict[str, Any]


class Server:
    """A server from config.toml. All methods belong to one event loop; none raises what a server does."""

    def __init__(self, settings: ServerSettings, log: ServerLog) -> None:
        self.settings = settings
        self.log = log
        self.state: State = "idle"
        self.trouble = ""
        """Why it is "failed" or "ended", as a sentence."""
        self.notes: tuple[str, ...] = ()
        """What of its list is not offered, and why."""
        self.tools: tuple[Listed, ...] = ()
        self._client: Client | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ready: asyncio.Future[None] | None = None
        self._stop = asyncio.Event()
        self._changed = False
        self._fault = ""

    async def start(self) -> None:
        """Start it, or wait until somebody else's start is through. Does not raise: `state` and `trouble` tell."""
        if self.state == "ended" and self._keeper is not None:
            # What is left of it is being put away.
            await asyncio.wait({self._keeper})
        if self._keeper is None or self._keeper.done():
            self.state, self.trouble = "starting", ""
            self._stop = asyncio.Event()
            ready = self._ready = asyncio.get_running_loop().create_future()
            self._keeper = asyncio.create_task(self._keep(self._ready), name=f"tools: {self.settings.name}")

            def over(_: asyncio.Task[None]) -> None:
                # A task that is cancelled before its first step runs nothing of its own.
                if not ready.done():
                    ready.set_result(None)

            self._keeper.add_done_callback(over)
        assert self._ready is not None
        await asyncio.wait({self._ready})

    async def stop(self) -> None:
        """End it; takes some three seconds at most. May be called more than once."""
        self._stop.set()
        if self._keeper is not None and not self._keeper.done():
            if self.state == "starting":
                self._keeper.cancel()
            _, late = await asyncio.wait({self._keeper}, timeout=5)
            if late:
                self._keeper.cancel()
                await asyncio.wait({self._keeper}, timeout=3)
        self.state = "idle"

    async def refresh(self) -> None:
        """List the tools again where the server has said that they changed."""
        if self._changed and self._client is not None:
            self._changed = False
            try:
                async with asyncio.timeout(self.settings.start_timeout_s):
                    await self._list(self._client)
            except Exception as error:
                self.log.note(f"listing the tools again failed: {_reason(error)}")

    async def call(self, name: str, arguments: dict[str, Any], limit: int = RESULT_MAX) -> Result:
        """Call a tool by the server's own name for it; errors and lateness are results."""
        begun = time.monotonic()

        def failed(why: str) -> Result:
            return Result(f"{name} failed: {why}", is_error=True, seconds=time.monotonic() - begun)

        if self.state in ("idle", "starting", "ended"):
            await self.start()
        client, keeper = self._client, self._keeper
        if self.state != "ready" or client is None or keeper is None:
            return failed(self.trouble or "the server is not running.")
        self._fault = ""
        call = asyncio.create_task(client.call_tool(name, arguments))
        try:
            await asyncio.wait({call, keeper}, timeout=self.settings.call_timeout_s, return_when="FIRST_COMPLETED")
            if not call.done():
                gone = keeper.done() or self.state != "ready"
                return failed(
                    self.trouble if gone else f"there was no answer within {self.settings.call_timeout_s:g} s."
                )
            if call.cancelled():
                # The connection's tasks took it with them.
                return failed(self.trouble or "the connection was closed.")
            if (error := call.exception()) is not None:
                # The end of a connection is noticed here first, and its reason a moment later.
                if "closed" in str(error).lower():
                    await asyncio.wait({keeper}, timeout=3)
                ended = self.trouble if self.state != "ready" else ""
                return failed(ended or self._fault or _reason(error))
            text, is_error, cut = read_result(call.result(), limit)
            return Result(text, is_error, cut, time.monotonic() - begun)
        finally:
            if not call.done():
                call.cancel()
                await asyncio.wait({call}, timeout=1)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Hold the connection from its beginning to its end: both must be in one task."""
        stdio: StdioServer | None = None
        was_ready = False
        try:
            await asyncio.to_thread(_import)
            async with asyncio.timeout(self.settings.start_timeout_s) as limit:
                if self.settings.command is not None:
                    stdio = StdioServer(self.settings, self.log)
                    self.log.note(f"starting: {self.settings.runs}")
                transport = stdio.streams() if stdio is not None else _http(self.settings, self._too_much)
                async with _client(transport, self) as client:
                    await self._list(client)
                    self._client, self.state, was_ready = client, "ready", True
                    ready.set_result(None)
                    limit.reschedule(None)
                    await self._until_over(stdio)
            if stdio is not None and stdio.why is not None and not self._stop.is_set():
                self._over("ended", f"the server {stdio.why}.")
        except asyncio.CancelledError:
            self._over("ended", "the server was stopped.")
            raise
        except TimeoutError:
            self._over("failed", f"the server was not ready within {self.settings.start_timeout_s:g} s.")
        except Exception as error:
            why = f"the server {stdio.why}." if stdio is not None and stdio.why else self._fault or _reason(error)
            self._over("ended" if was_ready else "failed", why)
        finally:
            self._client = None
            if not ready.done():
                ready.set_result(None)

    def _too_much(self) -> None:
        """An HTTP response is too long; the SDK tells of a connection that was closed."""
        self._fault = f"the server sent more than {MESSAGE_MAX // 2**20} MiB."

    def _over(self, state: State, trouble: str) -> None:
        self.state, self.trouble = state, trouble
        self.log.note(trouble)

    async def _until_over(self, stdio: StdioServer | None) -> None:
        """Wait until it is to be stopped, or has ended by itself."""
        waits = [asyncio.create_task(self._stop.wait())]
        if stdio is not None:
            waits.append(asyncio.create_task(stdio.ended.wait()))
        try:
            await asyncio.wait(waits, return_when="FIRST_COMPLETED")
        finally:
            for each in waits:
                each.cancel()
        if not self._stop.is_set():
            # Before the connection is closed: calls that run must not be told another reason.
            self._over("ended", f"the server {stdio.why if stdio and stdio.why else 'closed the connection'}.")

    async def _list(self, client: Client) -> None:
        """Read the list of tools, page by page, as far as it is offered."""
        listed: list[Listed] = []
        seen = left_out = 0
        cursor: str | None = None
        for _ in range(PAGES_MAX):
            page = await client.list_tools(cursor=cursor, cache_mode="refresh")
            for tool in page.tools:
                seen += 1
                if len(listed) >= TOOLS_MAX:
                    continue
                if len(json.dumps(tool.input_schema)) > SCHEMA_MAX:
                    left_out += 1
                    continue
                schema = {"type": "object", "properties": {}, **tool.input_schema}
                listed.append(Listed(tool.name, (tool.description or tool.title or "")[:DESCRIPTION_MAX], schema))
            cursor = page.next_cursor
            if not cursor or seen >= LISTED_MAX:
                break
        notes = []
        if seen > len(listed) + left_out:
            more = " or more" if cursor else ""
            notes.append(f"It lists {seen:,}{more} tools; the first {len(listed)} are offered.")
        if left_out:
            notes.append(f"{left_out:,} tools are left out: their schemas are longer than {SCHEMA_MAX:,} characters.")
        self.tools, self.notes = tuple(listed), tuple(notes)

    async def heard(self, message: Any) -> None:
        """Take a message that answers nothing."""
        if type(message).__name__ == "ToolListChangedNotification":
            self._changed = True


def _import() -> None:
    """Import `mcp`, which takes a second or two, outside the event loop."""
    import mcp  # noqa: F401

    for name in ("mcp", "client"):
        # Python prints warnings of loggers without a handler to the terminal, over whatever is shown there.
        logging.getLogger(name).addHandler(logging.NullHandler())


@contextlib.asynccontextmanager
async def _client(transport: Any, server: Server) -> AsyncIterator[Client]:
    from mcp import Client, Implementation

    about = Implementation(name="edger1", version=__version__)
    async with Client(transport, message_handler=server.heard, client_info=about, cache=None) as client:
        yield client


@contextlib.asynccontextmanager
async def _http(settings: ServerSettings, too_much: Callable[[], None]) -> AsyncIterator[Any]:
    """Streamable HTTP, with a limit to what one response may hold."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    class Limited(httpx2.AsyncByteStream):
        def __init__(self, stream: Any) -> None:
            self._stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            seen = 0
            async for piece in self._stream:
                seen += len(piece)
                if seen > MESSAGE_MAX:
                    too_much()
                    raise httpx2.ReadError("The response is too long.")
                yield piece

        async def aclose(self) -> None:
            await self._stream.aclose()

    class Transport(httpx2.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            response = await super().handle_async_request(request)
            response.stream = Limited(response.stream)
            return response

    timeout = httpx2.Timeout(settings.start_timeout_s, read=settings.call_timeout_s)
    async with (
        httpx2.AsyncClient(headers=settings.headers, timeout=timeout, transport=Transport()) as http,
        streamable_http_client(str(settings.url), http_client=http) as streams,
    ):
        yield streams


def _reason(error: BaseException) -> str:
    """Return the first cause in a group of errors as one sentence."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {said}" if said else f"{type(error).__name__}."
