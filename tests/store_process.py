"""A second window for the tests of the store: python store_process.py DATABASE CONVERSATION PARENT NAME SECONDS.

Writes an answer in pieces, and messages, until the time is over, and prints what it wrote and the longest write.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.tree import Node


def main(database: str, conversation: str, parent: str, name: str, seconds: str) -> None:
    store = Store.open(Path(database))
    longest = held_up = 0.0
    added: list[str] = []
    pieces = 0

    def timed(work: object, *given: object) -> None:
        nonlocal longest
        begin = time.perf_counter()
        work(*given)  # type: ignore[operator]
        longest = max(longest, time.perf_counter() - begin)

    answer = Node("assistant", parent=parent)
    store.add(conversation, answer)
    own = store.create(model=name, settings=Settings())
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
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
    said = {"answer": answer.id, "pieces": pieces, "own": own, "added": added, "longest": longest, "held_up": held_up}
    print(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
