"""The tools of a conversation, under one roof: unique names, one way to call."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.errors import UsageError
from edger1.tools.functions import FunctionTool, function_tool, load_functions
from edger1.tools.kinds import RESULT_MAX, Result, Tool
from edger1.tools.logs import ServerLog
from edger1.tools.server import Server, State
from edger1.tools.settings import ToolSettings

NAME_MAX = 64


@dataclass(frozen=True)
class ServerView:
    """What there is to say of a server, or of the Python functions, where `origin` begins with "python:"."""

    name: str
    origin: str
    state: State
    trouble: str
    notes: tuple[str, ...]
    runs: str
    tools: tuple[Tool, ...]
    log: Path | None


class Toolbox:
    """Functions and servers. All methods belong to one event loop; no method raises what a tool or server does.

    Nothing is started before `ready` or a call. `limit` is the number of characters of a result that are kept.
    """

    def __init__(
        self,
        settings: ToolSettings | None = None,
        functions: Iterable[Callable[..., Any]] = (),
        *,
        logs: Path | None = None,
        limit: int = RESULT_MAX,
    ) -> None:
        """Take what config.toml names, and functions or `FunctionTool`s of the caller's own.

        Raises UsageError for a function that cannot be a tool. Logs are kept in `logs`, by default beside the data.
        """
        self.limit = limit
        settings = settings or ToolSettings()
        folder = logs or paths.data() / "logs"
        self._servers = {
            each.name: Server(each, ServerLog(folder / f"mcp-{_plain(each.name)}.log")) for each in settings.servers
        }
        self._files = settings.functions
        self._function_timeout_s = settings.function_timeout_s
        self._functions: dict[str, tuple[FunctionTool, ...]] = {}
        self._file_trouble: dict[str, str] = {}
        self._loading: asyncio.Lock | None = None
        for each in functions:
            made = each if isinstance(each, FunctionTool) else function_tool(each)
            self._functions[made.tool.origin] = (*self._functions.get(made.tool.origin, ()), made)

    async def ready(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        """Start what was not started yet, and return `list(off)`. A server that failed is not tried again."""
        await self._load_files()
        wanted = [each for each in self._servers.values() if f"mcp:{each.settings.name}" not in off]
        await asyncio.gather(*(each.start() for each in wanted if each.state in ("idle", "starting", "ended")))
        await asyncio.gather(*(each.refresh() for each in wanted))
        return self.list(off)

    def list(self, off: Collection[str] = ()) -> tuple[Tool, ...]:
        """Return the tools that are known now, without those whose `origin` or `key` is in `off`."""
        return tuple(tool for tool in self._all() if tool.origin not in off and tool.key not in off)

    def find(self, name: str) -> Tool | None:
        """Return the tool that the model means by a name: one of `list`, or "server__tool"."""
        tools = self._all()
        return next((tool for tool in tools if tool.name == name), None) or next(
            (tool for tool in tools if _long_name(tool) == name), None
        )

    async def call(self, name: str, arguments: Any, *, tool: Tool | None = None) -> Result:
        """Run a tool and return what came of it; raises CancelledError alone, and the tool is stopped then.

        Whether it may run was asked before, see `edger1.tools.approval`. `tool` is what was approved: one that has
        become another since (a server listed its tools anew) is not called.
        """
        begun = time.monotonic()
        found = self.find(name)
        if found is None:
            names = ", ".join(sorted(each.name for each in self._all())[:50]) or "none"
            return Result(f"There is no tool {name!r}. The tools are: {names}.", is_error=True)
        if tool is not None and (tool.key, tool.fingerprint) != (found.key, found.fingerprint):
            return Result(f"{name} is not called: it has changed since it was approved.", is_error=True)
        if not isinstance(arguments, dict):
            return Result(f"{name} is not called: its arguments are no JSON object.", is_error=True)
        try:
            kind, _, owner = found.origin.partition(":")
            if kind == "mcp":
                return await self._servers[owner].call(found.own_name, arguments, self.limit)
            function = next(each for each in self._functions[found.origin] if each.tool.own_name == found.own_name)
            return await function.call(arguments, timeout_s=self._function_timeout_s, limit=self.limit)
        except Exception as error:
            return Result(f"{name} failed: {type(error).__name__}: {error}", True, seconds=time.monotonic() - begun)

    def servers(self) -> tuple[ServerView, ...]:
        """Return how each server and each file of functions is, in the order of config.toml."""
        tools = self._all()

        def of(origin: str) -> tuple[Tool, ...]:
            return tuple(tool for tool in tools if tool.origin == origin)

        views = []
        for name, server in self._servers.items():
            origin = f"mcp:{name}"
            views.append(
                ServerView(
                    name, origin, server.state, server.trouble, server.notes, server.settings.runs, of(origin),
                    server.log.path,
                )
            )  # fmt: skip
        for origin in dict.fromkeys([*(f"python:{path}" for path in self._files), *self._functions]):
            trouble = self._file_trouble.get(origin, "")
            where = origin.partition(":")[2]
            loaded: State = "failed" if trouble else "ready" if origin in self._functions else "idle"
            views.append(ServerView(Path(where).name, origin, loaded, trouble, (), where, of(origin), None))
        return tuple(views)

    def log(self, origin: str) -> str:
        """Return the end of a server's log; empty where there is none."""
        server = self._servers.get(origin.removeprefix("mcp:"))
        return server.log.tail() if server is not None else ""

    async def restart(self, origin: str) -> None:
        """End a server and start it again, or read a file of functions again."""
        if origin.startswith("mcp:"):
            server = self._servers[origin.removeprefix("mcp:")]
            await server.stop()
            await server.start()
        elif origin.removeprefix("python:") in map(str, self._files):
            self._functions.pop(origin, None)
            self._file_trouble.pop(origin, None)
            await self._load_files()

    async def close(self) -> None:
        """End all servers. May be called more than once."""
        await asyncio.gather(*(each.stop() for each in self._servers.values()))

    async def _load_files(self) -> None:
        self._loading = self._loading or asyncio.Lock()
        async with self._loading:
            for path in self._files:
                origin = f"python:{path}"
                if origin in self._functions or origin in self._file_trouble:
                    continue
                try:
                    self._functions[origin] = tuple(await asyncio.to_thread(load_functions, path))
                except UsageError as error:
                    self._file_trouble[origin] = str(error)

    def _all(self) -> tuple[Tool, ...]:
        """Return every known tool under a unique name: its own where no other has it, else with its owner's before.

        All tools that share a name get the longer one, so that no server can take the place of another's tool.
        """
        found = [each.tool for made in self._functions.values() for each in made]
        for name, server in self._servers.items():
            for listed in server.tools:
                own = _plain(listed.name)
                found.append(
                    Tool(own, listed.description, listed.schema, f"mcp:{name}", listed.name, server.settings.runs)
                )
        counts: dict[str, int] = {}
        for tool in found:
            counts[tool.name] = counts.get(tool.name, 0) + 1
        taken = {name for name, count in counts.items() if count == 1}
        named = []
        for tool in found:
            if counts[tool.name] > 1:
                name = _long_name(tool)
                if name in taken:
                    name = f"{name[: NAME_MAX - 9]}_{hashlib.sha256(tool.key.encode()).hexdigest()[:8]}"
                taken.add(name)
                tool = replace(tool, name=name)
            named.append(tool)
        return tuple(named)


def _plain(name: str) -> str:
    """Return a name of the characters that are allowed, up to 64 of them."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:NAME_MAX] or "_"


def _long_name(tool: Tool) -> str:
    kind, _, owner = tool.origin.partition(":")
    owner = owner if kind == "mcp" else Path(owner).stem
    return _plain(f"{owner}__{tool.own_name or tool.name}")
