"""Milliseconds from a key to the screen, in a terminal of its own, while an answer streams above the text.

    python tests/prompt_latency.py [plain|files|commands|paste]

`files` types into the picker over a tree of 30,000 files, `paste` puts a megabyte before every tenth key.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import re
import select
import struct
import sys
import tempfile
import termios
import time
from itertools import cycle
from pathlib import Path

from prompting import PromptApp
from textual.app import ComposeResult
from textual.containers import VerticalScroll

from edger1.tui.widgets.answer import Answer

KEYS = 60
GAP_S = 0.08
TOKENS_PER_S = 50
WORDS = "the **model** says that `x = 1` and goes on with\n\n- a list\n- of things\n\n"


class Streaming(PromptApp):
    def compose(self) -> ComposeResult:
        with VerticalScroll(can_focus=False) as above:
            above.anchor()
            yield Answer(time.monotonic)
        yield self.area

    def on_mount(self) -> None:
        super().on_mount()
        self.run_worker(self._stream())

    async def _stream(self) -> None:
        answer = self.query_one(Answer)
        for word in cycle(re.split(" ", WORDS)):
            await answer.feed(word + " ")
            await asyncio.sleep(1 / TOKENS_PER_S)


def child(kind: str) -> None:
    root = Path.cwd()
    if kind == "files":
        root = Path(tempfile.gettempdir()) / "edger1-prompt-latency"
        for folder in range(300):
            (root / f"folder{folder}").mkdir(parents=True, exist_ok=True)
            for number in range(100):
                (root / f"folder{folder}" / f"module_{number}.py").touch()
    Streaming(root).run()


def main(kind: str) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        child(kind)
        os._exit(0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))

    def read(until: bytes | None, for_s: float) -> float | None:
        seen, began = b"", time.perf_counter()
        while (left := for_s - (time.perf_counter() - began)) > 0:
            if select.select([terminal], [], [], left)[0]:
                seen = seen[-64:] + os.read(terminal, 65_536)
                if until is not None and until in seen:
                    return time.perf_counter() - began
        return None

    read(None, 12 if kind == "files" else 5)
    if kind in ("files", "commands"):
        os.write(terminal, b"@m" if kind == "files" else b"/")
        read(None, 5)
    taken = []
    for at in range(KEYS):
        if kind == "paste" and at % 10 == 0:
            _write(terminal, read, b"\x1b[200~" + b"word " * 200_000 + b"\x1b[201~")
        # Every key is a letter that stands nowhere else, so that the screen shows when it has arrived.
        key = chr(0x100 + at).encode()
        if kind == "files":
            # Narrow and widen the list as well.
            os.write(terminal, b"o" if at % 2 == 0 else b"\x7f")
            read(None, GAP_S)
        began = time.perf_counter()
        os.write(terminal, key)
        if read(key, 5) is not None:
            taken.append((time.perf_counter() - began) * 1000)
        if kind in ("files", "commands"):
            os.write(terminal, b"\x7f")
        read(None, GAP_S)
    os.write(terminal, b"\x11")
    os.kill(pid, 15)
    taken.sort()
    middle, late = taken[len(taken) // 2], taken[int(len(taken) * 0.99)]
    print(f"{kind}: {len(taken)} of {KEYS} keys; median {middle:.1f} ms, 99% {late:.1f} ms, most {taken[-1]:.1f} ms")


def _write(terminal: int, read: object, data: bytes) -> None:
    for at in range(0, len(data), 4096):
        os.write(terminal, data[at : at + 4096])
        read(None, 0.0005)  # type: ignore[operator]


if __name__ == "__main__":
    main(re.sub(r"\W", "", sys.argv[1] if len(sys.argv) > 1 else "plain"))
