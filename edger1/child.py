"""The engine as a process of its own: `python -m edger1.child [CEILING_BYTES]`.

One request a line comes in on standard input, one event a line goes out on standard output. Whatever else writes to
standard output here goes to standard error, so that it cannot break the lines. The process ends when its input does.
"""

from __future__ import annotations

import os
import queue
import sys
import threading

from edger1.messages import Event, Request, decode, encode


def main() -> None:
    """Serve until standard input closes."""
    ceiling_bytes = int(sys.argv[1]) if len(sys.argv) > 1 else None
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()

    def emit(event: Event) -> None:
        out.write(encode(event) + "\n")

    def read() -> None:
        try:
            for line in sys.stdin:
                inbox.put(decode(line))  # type: ignore[arg-type]
        finally:
            # Also where the other side was killed in the middle of a line: nothing may keep this process.
            inbox.put(None)

    threading.Thread(target=read, name="edger1-requests", daemon=True).start()

    from edger1.engine import Scheduler

    try:
        Scheduler(emit, ceiling_bytes).run(inbox)
    except BrokenPipeError:
        # The other side is gone; there is nobody left to tell.
        os._exit(1)


if __name__ == "__main__":
    main()
