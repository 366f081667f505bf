"""The chat in lines: what is said, in which order, and what is kept."""

from __future__ import annotations

import io
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FIGURES, GONE, FakeBackend, words
from plain_chat_script import Scripted

from edger1.cli.plain_chat import Lines, PlainChat
from edger1.messages import Done, Failed, Loaded, Progress, Text, Thought
from edger1.tui.settings import Settings
from edger1.tui.store import Store
from edger1.tui.terminal import accessible, colourless, full_screen, in_lines

TESTS = Path(__file__).parent
DRAFTS = {"drafted": 20, "accepted": 15, "steps": 9, "gain": 1.5, "sources": {}, "off": ""}
DRAFTED = replace(FIGURES, figures=replace(FIGURES.figures, drafts=DRAFTS))


def talk(typed: str, backend: FakeBackend, **more: Any) -> str:
    """What is written while a user types lines that do not come from a terminal."""
    target = io.StringIO()
    PlainChat(backend, "smollm2", Lines(io.StringIO(typed), target, colour=True), **more).run()
    assert backend.closed
    return target.getvalue()


def test_a_conversation_is_told_in_order() -> None:
    backend = Scripted(
        [*words("Hm, two.", Thought), *words("\n\nIt is **four**."), FIGURES], [*words("Five."), FIGURES]
    )
    said = talk("2 + 2?\nand 2 + 3?", backend, settings=Settings(system="Be brief."))
    assert said == (
        "Chat with smollm2. /help lists the commands; Ctrl-C stops an answer; Ctrl-D ends.\n"
        "Loading smollm2.\n"
        "Ready after 0.0 s.\n"
        "You: 2 + 2?\n"
        "Thinking: Hm, two.\n"
        "Thought for 0.0 s, 2 words.\n"
        "smollm2: It is **four**.\n"
        "You: and 2 + 3?\n"
        "smollm2: Five.\n"
        "You: \n"
    )
    assert [each["content"] for each in backend.asked[1]] == ["Be brief.", "2 + 2?", "It is **four**.", "and 2 + 3?"]


def test_thoughts_can_be_left_out() -> None:
    backend = Scripted([*words("Secret.", Thought), *words("Four."), FIGURES])
    said = talk("2 + 2?\n/thoughts on\nagain?\n", backend, thoughts=False)
    assert "Thinking.\nThought for 0.0 s, 1 words.\nsmollm2: Four.\n" in said
    assert "Reasoning is written out.\n" in said
    assert said.count("Secret.") == 1


def test_what_a_terminal_would_obey_is_removed() -> None:
    backend = Scripted([Thought("", "\x1b]0;title\x07t"), Text("", "a\x1b[2Jb\rc\x9bd"), Done("", "length")])
    said = talk("x\x1b[31my\n", backend)
    assert "\x1b" not in said
    assert "\x07" not in said
    assert "smollm2: a[2Jbcd\nStopped at the limit of length.\n" in said


def test_a_model_in_a_folder_is_called_by_its_last_name() -> None:
    target = io.StringIO()
    PlainChat(
        Scripted([*words("Hi."), FIGURES]), "/models/mine/", Lines(io.StringIO("a\n"), target, colour=False)
    ).run()
    assert "\nmine: Hi.\n" in target.getvalue()


def test_commands() -> None:
    backend = Scripted([*words("One."), FIGURES], [*words("Two."), FIGURES], [*words("Three."), FIGURES])
    typed = "/retry\nq\n/retry\n/system Be kind.\n/new\nr\n/system none\n/figures\n/hlep\n/zzz\n /zzz\n/stop\n"
    typed += "/quit\nnever\n"
    said = talk(typed, backend)
    assert "There is no message to answer yet." in said
    assert [[each["content"] for each in asked] for asked in backend.asked[:3]] == [["q"], ["q"], ["Be kind.", "r"]]
    assert "smollm2: One.\nYou: /retry\nsmollm2: Two.\n" in said
    assert "System prompt: Be kind." in said
    assert "There is no system prompt." in said
    assert "48.3 tok/s · context 448 / 8,192 · first token 0.21 s · " in said
    assert "prompt 12 new, 340 cached" in said
    assert "There is no command /hlep. Did you mean /help? Put a space" in said
    assert "There is no command /zzz. /help lists them." in said
    assert backend.asked[3][-1]["content"] == "/zzz"
    assert "Ctrl-C stops one." in said
    assert len(backend.asked) == 4
    assert backend.under[2].system == "Be kind."


def test_a_message_of_several_lines() -> None:
    backend = Scripted()
    talk('"""one\ntwo"""\n"""\nthree\n"""\n/help\n"""never ended\n', backend)
    assert [asked[-1]["content"] for asked in backend.asked] == ["one\ntwo", "three"]


def test_an_engine_that_dies_is_told_of_and_started_again() -> None:
    loads = [
        [Loaded("", "m")],
        [Failed("", "MemoryCeilingError", "Too big.")],
        [Progress("", "load", 1, 2), Loaded("", "m")],
    ]
    backend = Scripted([*words("Half"), GONE], [*words("Whole."), FIGURES], loads=loads)
    said = talk("q\n/retry\n/retry\n", backend)
    assert "smollm2: Half\nThe answer failed. The engine was killed by the system" in said
    assert "The model could not be loaded. Too big." in said
    assert said.endswith("Loading smollm2.\nReady after 0.0 s.\nsmollm2: Whole.\nYou: \n")
    assert [[each["content"] for each in asked] for asked in backend.asked] == [["q"], ["q"]]


def test_a_conversation_is_kept_as_it_is_said(tmp_path: Path) -> None:
    store_module = pytest.importorskip("edger1.tui.store")
    store = store_module.Store.open(tmp_path / "c.db")
    backend = Scripted([*words("Hm.", Thought), *words("One."), FIGURES], [*words("Two."), Done("", "length")])
    file = tmp_path / "c.md"
    said = talk(f"q\n/retry\nr\n/save {file}\n/save {file}\n/save {tmp_path}/no/c.md\n", backend, store=store)
    (summary,) = store.list()
    stored = store.load(summary.id)
    assert [(node.role, node.text, node.finish) for node in stored.tree.path()][:2] == [
        ("user", "q", None),
        ("assistant", "Two.", "length"),
    ]
    first = stored.tree.siblings(stored.tree.path()[1].id)[0]
    assert (first.text, first.thought, first.finish, first.model) == ("One.", "Hm.", "stop", "smollm2")
    assert first.figures is not None
    assert first.figures["figures"]["context_used"] == 448
    assert store.history()[-2:] == ["q", "r"]
    assert f"Saved to {file}.\n" in said
    assert f"{file} exists already" in said
    assert "cannot be written: no such file" in said
    assert "Two." in file.read_text()


# The terminal


# Popen's preexec_fn would run in a fork of this process, where it may wait for ever for a lock of another thread.
OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, command: list[str], **environ: str) -> None:
        self._master, child = pty.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *command],
            stdin=child,
            stdout=child,
            stderr=child,
            env={**os.environ, "TERM": "xterm-256color", "PYTHONPATH": path(), **environ},
            start_new_session=True,
        )
        os.close(child)
        self.said = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, words: str, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while words not in self.said:
            ready, _, _ = select.select([self._master], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise AssertionError(f"{words!r} never came; there was {self.said!r}")
            try:
                self.said += os.read(self._master, 65536).decode().replace("\r\n", "\n")
            except OSError:
                raise AssertionError(f"{words!r} never came; there was {self.said!r}") from None

    def after(self, words: str) -> None:
        """Forget what was said up to `words`, when they have come."""
        self.until(words)
        self.said = self.said.split(words, 1)[1]

    def end(self) -> int:
        return self._process.wait(60)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)


def path() -> str:
    return os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def scripted() -> Iterator[Terminal]:
    terminal = Terminal([sys.executable, str(TESTS / "plain_chat_script.py")], NO_COLOR="")
    yield terminal
    terminal.kill()


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(scripted: Terminal) -> None:
    scripted.after("You: ")
    scripted.type("2 + 2?\n")
    scripted.until("scripted: Four. [31mNot red.")
    assert "\x1b[2mIt i\x1b[0m" in scripted.said
    scripted.after("You: ")
    scripted.type("a story\n")
    scripted.after("A long story")
    scripted.type("\x03")
    scripted.after("Stopped. What was said is kept.\n")
    scripted.type("on\n")
    scripted.until("scripted: After it.\n")
    assert "never told" not in scripted.said


def test_a_second_ctrl_c_ends_a_chat_whose_engine_does_not_stop() -> None:
    terminal = Terminal([sys.executable, str(TESTS / "plain_chat_script.py"), "--stuck"])
    try:
        terminal.after("You: ")
        terminal.type("2 + 2?\n")
        terminal.after("Not red.\n")
        terminal.type("a story\n")
        terminal.after("A long story")
        terminal.type("\x03")
        time.sleep(0.3)
        terminal.type("\x03")
        terminal.until("Ended.\n")
        assert terminal.end() == 0
        assert "Traceback" not in terminal.said
    finally:
        terminal.kill()


def test_ctrl_c_at_the_prompt_says_how_to_end_and_ctrl_d_ends(scripted: Terminal) -> None:
    scripted.after("You: ")
    scripted.type("half a line")
    # Python's readline hears a signal only while it waits for a key, and says so by nothing but the echo of the last.
    scripted.after("half a line")
    time.sleep(0.2)
    scripted.type("\x03")
    scripted.after("Ctrl-D or /quit ends the chat.")
    scripted.after("You: ")
    scripted.type("\x04")
    assert scripted.end() == 0


def test_lines_are_edited_and_remembered(scripted: Terminal) -> None:
    scripted.after("You: ")
    scripted.type("/figurez\x7fs\n")
    scripted.after("Nothing has been answered yet.")
    scripted.after("You: ")
    scripted.type("\x1b[A\n")
    scripted.after("Nothing has been answered yet.")
    scripted.after("You: ")
    scripted.type("/fi\t\n")
    scripted.until("Nothing has been answered yet.")


def test_without_colour_nothing_but_text_is_written() -> None:
    terminal = Terminal([sys.executable, str(TESTS / "plain_chat_script.py")], NO_COLOR="1", TERM="dumb")
    try:
        terminal.until("You: ")
        terminal.type("2 + 2?\n")
        terminal.until("Not red.\n")
        terminal.type("/quit\n")
        assert terminal.end() == 0
        assert "\x1b" not in terminal.said
        assert "Thinking: It is even.\nThought for" in terminal.said
    finally:
        terminal.kill()


# What is decided from the environment


@pytest.mark.parametrize(
    ("environ", "stdin", "stdout", "configured", "expected"),
    [
        ({"TERM": "xterm"}, True, True, False, False),
        ({"TERM": "dumb"}, True, True, False, True),
        ({}, True, True, False, True),
        ({"TERM": "xterm", "EDGER1_ACCESSIBLE": "1"}, True, True, False, True),
        ({"TERM": "xterm"}, True, True, True, True),
        ({"TERM": "xterm", "EDGER1_ACCESSIBLE": "0"}, True, True, True, False),
        ({"TERM": "xterm"}, True, False, False, True),
        ({"TERM": "xterm"}, False, True, False, False),
        ({"TERM": "dumb", "EDGER1_ACCESSIBLE": "1"}, False, False, True, False),
    ],
)
def test_lines_are_for_who_types_and_has_no_screen(
    environ: dict[str, str], stdin: bool, stdout: bool, configured: bool, expected: bool
) -> None:
    assert in_lines(environ, stdin, stdout, configured=configured) is expected


@pytest.mark.parametrize(
    ("environ", "colours", "expected"),
    [
        ({"TERM": "xterm-256color"}, 256, False),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, 256, True),
        ({"TERM": "xterm-256color", "NO_COLOR": ""}, 256, False),
        ({"TERM": "vt100"}, -1, True),
        ({"TERM": "vt100", "COLORTERM": "truecolor"}, -1, False),
        ({"TERM": "strange"}, None, False),
        ({"TERM": "dumb"}, None, True),
    ],
)
def test_no_colour_where_it_is_refused_or_missing(environ: dict[str, str], colours: int | None, expected: bool) -> None:
    assert colourless(environ, colours) is expected
    assert full_screen(environ) is (environ["TERM"] != "dumb")
    assert accessible(environ) is False


# Thinking, samples and drafts


def test_thinking_samples_and_drafts_are_set_by_commands_and_kept(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "c.db")
    backend = Scripted([*words("One."), DRAFTED])
    typed = "/think off\n/budget 200-2000\n/think\n/samples\n/speculate auto\n/shift on\n/budget much\n/samples 99\n"
    typed += "q\n/figures\n/others\n"
    said = talk(typed, backend, store=store, settings=Settings(think="on"))
    assert "With thinking on.\n" in said
    assert "Thinking: off.\n" in said
    assert "200–2,000 tokens of thought.\n" in said
    # Without a word they only say how things are: nobody sees a line change.
    assert "You: /think\nThinking: auto, 200–2,000 tokens of thought.\n" in said
    assert "One answer to each question.\n" in said
    assert "Drafts: auto.\n" in said
    assert "Context shift: on. Where the context is full, the oldest turns are dropped.\n" in said
    assert "expected tokens, as in 500" in said
    assert "from 1 to 64" in said
    assert "drafts 75% stood, 1.5 times as fast" in said
    assert "The last answer was not voted on" in said
    settings = Settings(think_budget=2000, think_at_least=200, speculate="auto", context_shift=True)
    assert backend.under == [settings]
    assert store.load(store.list()[0].id).settings == settings


def test_the_winner_of_several_samples_is_written_once_all_are_over(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "c.db")
    backend = Scripted(
        [*words("It is 5."), FIGURES],
        [*words("Two and two.", Thought), *words("It is 4\x1b[2J."), FIGURES],
        [*words("It is 4\x1b[2J."), FIGURES],
        [*words("Last."), FIGURES],
    )
    said = talk("/samples 3\n2 + 2?\n/others\n/samples 1\nand?\n", backend, store=store)
    after = said.split("You: 2 + 2?\n")[1]
    assert after.startswith("0 of 3 done.\n1 of 3 done.\n")
    assert "3 of 3 done.\nThinking: Two and two.\nThought for " in after
    assert ", 3 words.\nsmollm2: It is 4[2J.\nVotes: " in after
    assert ": 2, " in after
    others = after.split("You: /others\n")[1].split("You: ")[0]
    assert ": It is 5.\n" in others
    assert ": It is 4[2J.\n" in others
    assert [each["content"] for each in backend.asked[1]] == ["2 + 2?", "It is 4\x1b[2J.", "and?"]
    stored = store.load(store.list()[0].id)
    assert [node.text for node in stored.tree.path()] == ["2 + 2?", "It is 4\x1b[2J.", "and?", "Last."]
    assert len(stored.tree) == 6


def test_samples_whose_engine_dies_are_told_of_once() -> None:
    backend = Scripted([*words("Half"), GONE], loads=[[Loaded("", "m")]])
    said = talk("q\n", backend, settings=Settings(samples=2))
    assert said.count("The answer failed. The engine was killed") == 1
    assert "smollm2: Half\n" in said
