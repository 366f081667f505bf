"""A tool server that misbehaves in the way that its first argument names. Plain JSON lines, no SDK."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

how = sys.argv[1]


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
    sys.stdout.flush()


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "description": "One.", "inputSchema": {"type": "object"}, **more}


def listed(cursor: str | None) -> dict[str, Any]:
    match how:
        case "thousands":
            return {"tools": [tool(f"tool{i}") for i in range(5000)]}
        case "endless":
            at = int(cursor or 0)
            return {"tools": [tool(f"tool{at}")], "nextCursor": str(at + 1)}
        case "fat":
            return {"tools": [tool("one"), tool("fat", inputSchema={"type": "object", "x": "y" * 100_000})]}
        case "names":
            return {"tools": [tool("a b/\x1b[31mc"), tool("n" * 100), tool("add")]}
        case "long":
            return {"tools": [tool("one", description="d" * 100_000)]}
    return {"tools": [tool("one")]}


if how == "silent":
    time.sleep(3600)
if how == "crash":
    print("no such database", file=sys.stderr, flush=True)
    sys.exit(3)
if how == "flood":
    while True:
        sys.stdout.write("x" * 65536)
if how in ("stubborn", "family"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if how == "family":
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(3600)"])
    print(f"child {child.pid}", file=sys.stderr, flush=True)
print(f"pid {os.getpid()}", file=sys.stderr, flush=True)
if how == "junk":
    print("Welcome to my server!\n\x1b[31m{not json}\n\n[1, 2]\n" + "z" * 100_000, flush=True)
if how == "noisy":
    for _ in range(40):
        sys.stderr.write("e" * 100_000)

for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    match asked["method"]:
        case "initialize":
            version = asked["params"]["protocolVersion"]
            info = {"name": "hostile", "version": "1"}
            result = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        case "tools/list":
            result = listed((asked.get("params") or {}).get("cursor"))
        case "tools/call" if how == "hang":
            continue
        case "tools/call" if how == "endless line":
            while True:
                sys.stdout.write("x" * 65536)
        case "tools/call" if how == "wrong":
            result = {"content": "no list"}
        case "tools/call" if how == "megabytes":
            result = {"content": [{"type": "text", "text": "x" * 5_000_000}]}
        case "tools/call":
            result = {"content": [{"type": "text", "text": "one"}]}
        case _:
            send({"id": asked["id"], "error": {"code": -32601, "message": "what?"}})
            continue
    send({"id": asked["id"], "result": result})
if how in ("stubborn", "family"):
    time.sleep(3600)
