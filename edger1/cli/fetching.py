"""Fetching a model in a process of its own, for a program that must not stand still: one JSON object a line.

`python -m edger1.cli.fetching NAME [--offline]` prints {"step": [stage, done, total, unit]} and {"note": text}, and at
the end {"folder": path} or {"error": class, "message": text}. Converting what was fetched needs MLX, which the chat's
own process does without. It stops where its standard output closes or it is terminated; what came stays on the disk.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any


def main() -> None:
    """Fetch what the command line names."""
    from edger1.errors import EdgeR1Error
    from edger1.fetch import Step, pull

    name, offline = sys.argv[1], "--offline" in sys.argv[2:]
    # Nobody asks for passwords here, and libraries that print must not come between the lines.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    sys.stdout = sys.stderr

    def say(value: dict[str, Any]) -> None:
        out.write(json.dumps(value) + "\n")

    def progress(step: Step) -> None:
        say({"step": [step.stage, step.done, step.total, step.unit]})

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True, name="edger1-parent").start()
    try:
        folder = pull(name, offline=offline, on_progress=progress, on_note=lambda text: say({"note": text}))
        say({"folder": str(folder)})
    except EdgeR1Error as error:
        say({"error": type(error).__name__, "message": str(error)})
    except (KeyboardInterrupt, BrokenPipeError):
        # The threads of a transfer may hang in a read; they hold nothing that would be lost.
        os._exit(1)


def _end_with_parent() -> None:
    """Stop when standard input closes, as it does when the parent dies."""
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
