"""A server of the Model Context Protocol, written with the SDK: `python tool_server.py` over stdio, or with a port."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Literal

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("test")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def shout(text: str, how: Literal["loud", "louder"] = "loud") -> str:
    """Say a text in capitals."""
    print("shouting", file=sys.stderr)
    return text.upper() + ("!" if how == "loud" else "!!")


@server.tool()
def fail() -> str:
    """Fail."""
    raise ToolError("it is broken")


@server.tool()
async def wait(seconds: float) -> str:
    """Wait."""
    await asyncio.sleep(seconds)
    return "waited"


@server.tool(structured_output=False)
def picture() -> Image:
    """Draw."""
    return Image(data=b"\x89PNG" + b"\0" * 300_000, format="png")


@server.tool(structured_output=False)
def much(size: int) -> str:
    """Say much."""
    return "x" * size


@server.tool()
def die(code: int) -> str:
    """End the server in the middle of a call."""
    os._exit(code)


@server.tool()
def number() -> int:
    """Tell the process's id."""
    return os.getpid()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
