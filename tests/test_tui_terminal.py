"""The chat in a real terminal, with a real model: what a person does in it, and what must survive a kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edger1.tui.store import Store
from edger1.tui.tree import Node

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux, which the terminal sessions run in, is not here"),
]
PATIENCE_S = 120.0
"""Seconds before a wait is given up: a busy machine is slow, and not wrong."""
QUESTION = "Tell me a very long story about a lighthouse keeper and the sea."
COLOUR = re.compile(r"\x1b\[(?:[0-9;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


def until(condition: Callable[[], bool], told: Callable[[], str]) -> None:
    """Wait for something; say what there was where it does not come."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"this never came about; there was:\n{told()}")
        time.sleep(0.1)


class Tmux:
    """A tmux server of the test's own, each of its sessions a terminal with a chat in it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._socket = f"edger1-{uuid.uuid4().hex[:8]}"
        # A server that ends with its last session may be asked for the next one while it does.
        self.run("start-server", ";", "set-option", "-g", "exit-empty", "off")

    def run(self, *words: str, check: bool = True, **variables: str) -> str:
        kept = {name: value for name, value in os.environ.items() if name not in ("TMUX", "NO_COLOR", "EDGER1_DEBUG")}
        environment = kept | {"EDGER1_HOME": str(self.home), "EDGER1_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
        command = ["tmux", "-L", self._socket, "-f", os.devnull, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=check, timeout=30)
        return done.stdout

    def close(self) -> None:
        self.run("kill-server", check=False)


class Window:
    """One chat in a terminal."""

    def __init__(self, tmux: Tmux, *words: str, size: tuple[int, int] = (100, 30), **variables: str) -> None:
        self._tmux, self._name = tmux, f"w{uuid.uuid4().hex[:6]}"
        wide, high = size
        given = [each for name, value in variables.items() for each in ("-e", f"{name}={value}")]
        chat = [sys.executable, "-m", "edger1", "chat", *words]
        tmux.run("new-session", "-d", "-s", self._name, "-x", str(wide), "-y", str(high), *given, *chat)
        self.pid = int(tmux.run("list-panes", "-t", self._name, "-F", "#{pane_pid}"))
        self.shows("Ask anything")

    def screen(self, *options: str) -> str:
        return self._tmux.run("capture-pane", "-p", *options, "-t", self._name, check=False)

    def shows(self, *wanted: str) -> None:
        self.until(lambda: all(each in self.screen() for each in wanted))

    def until(self, condition: Callable[[], bool]) -> None:
        until(condition, self.screen)

    def press(self, *keys: str) -> None:
        self._tmux.run("send-keys", "-t", self._name, *keys)

    def type(self, text: str) -> None:
        self._tmux.run("send-keys", "-l", "-t", self._name, text)

    def resize(self, wide: int, high: int) -> None:
        self._tmux.run("resize-window", "-t", self._name, "-x", str(wide), "-y", str(high))

    def quit(self) -> None:
        self.press("C-q")
        self.until(lambda: self._name not in self._tmux.run("list-sessions", "-F", "#{session_name}", check=False))


@pytest.fixture
def tmux(smollm2: Path) -> Iterator[Tmux]:
    home = Path(os.environ["EDGER1_HOME"])
    models = home / "v1" / "models"
    models.mkdir(parents=True)
    (models / "smollm2-135m").symlink_to(smollm2)
    up = Tmux(home)
    try:
        yield up
    finally:
        up.close()
    until(lambda: not living(home), lambda: f"processes {living(home)}")


def living(home: Path) -> list[int]:
    """Processes that work in the test's data folder, the terminals' own server aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            here = f"EDGER1_HOME={home}\0".encode() in (folder / "environ").read_bytes()
            if here and not (folder / "comm").read_text().startswith("tmux"):
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def talks(home: Path) -> list[list[Node]]:
    """What is saved, read beside the windows that write it: the shown messages of each conversation, newest first."""
    store = Store.open(home / "v1" / "conversations.db")
    try:
        return [store.load(each.id).tree.path() for each in store.list()]
    finally:
        store.close()


def answered(home: Path, window: Window, questions: int = 1) -> None:
    """Wait until the newest conversation's last answer is over; a long one is stopped once there is much of it."""

    def over() -> bool:
        found = talks(home)
        if not found or len(found[0]) < 2 * questions or found[0][-1].role != "assistant":
            return False
        last = found[0][-1]
        if last.finish is None and len(last.text) > 80:
            window.press("Escape")
        return last.finish is not None

    window.until(over)


def answering(home: Path) -> str:
    """What the newest conversation's answer has come to in the file: nothing, before there is one."""
    last = next((found[-1] for found in talks(home)[:1]), None)
    return last.text if last is not None and last.role == "assistant" else ""


def letters(text: str) -> str:
    return "".join(each for each in text.lower() if each.isalpha())


def test_a_day_with_the_chat(tmux: Tmux) -> None:
    window = Window(tmux)
    # Before the model is there: it is asked as soon as it is.
    window.type(QUESTION)
    window.press("Enter")
    window.until(lambda: len(answering(tmux.home)) > 40)
    window.press("Escape")
    window.shows("Stopped.")
    # What is shown is saved within a second.
    window.until(lambda: talks(tmux.home)[0][-1].finish is not None)
    asked, stopped = talks(tmux.home)[0]
    assert (asked.text, stopped.finish) == (QUESTION, "cancelled")
    assert letters(stopped.text)[:12] in letters(window.screen("-S", "-"))

    window.press("F5")
    window.shows("esc leave")
    window.type(" Leave out the sea.")
    window.press("Enter")
    window.until(lambda: talks(tmux.home)[0][0].text.endswith("Leave out the sea."))
    answered(tmux.home, window)
    window.shows("out the sea.", "2/2")

    first = talks(tmux.home)[0][-1]
    window.press("F7")
    window.until(lambda: talks(tmux.home)[0][-1].id != first.id)
    answered(tmux.home, window)
    second = talks(tmux.home)[0][-1]
    window.press("M-Left")
    window.until(lambda: talks(tmux.home)[0][-1].id == first.id)
    window.press("M-Right")
    window.until(lambda: talks(tmux.home)[0][-1].id == second.id)

    window.press("C-n")
    window.until(lambda: "Leave out" not in window.screen())
    window.press("C-o")
    window.shows("Today")
    window.type("lighthouse")
    window.shows("lighthouse keeper")
    # Enter waits for a search that is under way.
    window.press("Enter")
    window.shows("out the sea.", "2/2")
    window.type("half a thought")
    window.shows("half a thought")
    window.quit()
    until(lambda: len(living(tmux.home)) == 0, lambda: f"processes {living(tmux.home)}")

    window = Window(tmux, "--continue")
    window.shows("half a thought", "2/2")
    shown = talks(tmux.home)[0]
    assert [node.id for node in shown][-1] == second.id
    assert letters(second.text)[-12:] in letters(window.screen("-S", "-"))
    window.quit()


def test_a_killed_chat_loses_at_most_a_second(tmux: Tmux) -> None:
    window = Window(tmux)
    window.type(QUESTION)
    window.press("Enter")
    window.until(lambda: len(answering(tmux.home)) > 40)
    seen = answering(tmux.home)
    # A busy machine's screen comes after the file.
    window.until(lambda: letters(seen)[:30] in letters(window.screen()))
    shown = letters(window.screen().split("sea.", 1)[-1].split("Ask anything")[0])
    # A second, and one for a machine that stands still.
    time.sleep(2.0)
    os.kill(window.pid, signal.SIGKILL)
    # The engine ends with the chat.
    window.until(lambda: window.pid not in living(tmux.home))
    kept = talks(tmux.home)[0][-1]
    assert kept.text.startswith(seen)
    # All of the answer that stood on the screen a second before, up to the line that says whose it is.
    assert longest_common(shown, letters(kept.text)) >= min(len(letters(seen)), len(shown)) - 3

    window = Window(tmux, "--continue")
    window.until(lambda: letters(kept.text)[-12:] in letters(window.screen("-S", "-")))
    window.quit()


def longest_common(one: str, other: str) -> int:
    from difflib import SequenceMatcher

    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size


def test_two_windows_share_a_home(tmux: Tmux) -> None:
    windows = [Window(tmux), Window(tmux)]
    for at, window in enumerate(windows):
        window.type(f"Write down what you know of lighthouse number {at}.")
        window.press("Enter")
    windows[0].until(lambda: len(talks(tmux.home)) == 2 and all(len(each) == 2 for each in talks(tmux.home)))
    windows[0].until(lambda: all(len(each[-1].text) > 20 or each[-1].finish for each in talks(tmux.home)))
    for window in windows:
        window.press("Escape")
    windows[0].until(lambda: all(each[-1].finish is not None for each in talks(tmux.home)))
    windows[0].press("C-o")
    windows[0].shows("lighthouse number 0", "lighthouse number 1")
    windows[0].press("Escape")
    for window in windows:
        window.quit()


def test_a_tiny_terminal_without_colour(tmux: Tmux) -> None:
    window = Window(tmux, size=(60, 15), NO_COLOR="1")
    window.type("half a thought")
    window.shows("half a thought")
    assert COLOUR.search(window.screen("-e")) is None
    window.press("F1")
    window.shows("Send the message")
    window.press("Escape")
    # Back at the text box: what is typed at once after an Escape would be an Alt key to any program.
    window.until(lambda: "half a thought" in window.screen() and "Send the message" not in window.screen())
    for size in ((20, 5), (120, 40), (60, 15)):
        window.resize(*size)
    window.type(", and more")
    window.shows("half a thought, and more")
    assert COLOUR.search(window.screen("-e")) is None
    assert all(len(line) <= 60 for line in window.screen().splitlines())
    window.quit()
