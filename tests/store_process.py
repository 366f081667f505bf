"""A second window for the tests of the store: python store_process.py DATABASE CONVERSATION PARENT NAME PIECES.

It says "ready" and waits for a line. Then it writes an answer in so many pieces, and messages, for a minute at most,
and prints what it wrote and how long a write took.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.tree import Node


def main(database: str, conversation: str, parent: str, name: str, wanted: str) -> None:
    store = Store.open(Path(database))
    held_up = 0.0
    writes: list[float] = []
    added: list[str] = []
    pieces = 0

    def timed(work: Callable[..., object], *given: object) -> None:
        begin = time.perf_counter()
        work(*given)
        writes.append(time.perf_counter() - begin)

    answer = Node("assistant", parent=parent)
    store.add(conversation, answer)
    own = store.create(model=name, settings=Settings())
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.monotonic() + 60
    while pieces < int(wanted) and time.monotonic() < end:
        timed(store.append, answer.id, f"{name}{pieces} ")
        pieces += 1
        # What a terminal was told before it was killed must be there.
        print(json.dumps({"answer": answer.id, "pieces": pieces}), flush=True)
        if pieces % 10 == 0:
            node = Node("user", f"{name} message {pieces} " * 20)
            timed(store.add, own, node)
            added.append(node.id)
        begin = time.perf_counter()
        time.sleep(0.002)
        held_up = max(held_up, time.perf_counter() - begin)
    # A busy machine holds a process up as long while it sleeps as while it writes.
    said = {"answer": answer.id, "pieces": pieces, "own": own, "added": added, "held_up": held_up}
    print(json.dumps(said | {"longest": max(writes), "usual": sorted(writes)[len(writes) * 9 // 10]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
