"""`edger1 chat --plain`: a conversation in lines, for terminals without a full screen, pipes and screen readers.

Everything is said once, in words and in the order in which it happens; nothing is redrawn. The conversation is kept
where the full screen keeps its conversations.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TextIO

from edger1.cli.plain_vote import REMARKS, PlainVote
from edger1.errors import UsageError
from edger1.messages import Done, Failed, Loaded, Progress, Text, Thought
from edger1.tui import dials
from edger1.tui.backend import Backend
from edger1.tui.clean import clean
from edger1.tui.figures import SEPARATOR, duration, fields, held, memory
from edger1.tui.settings import Settings
from edger1.tui.tree import Node, Tree
from edger1.tui.votes import tally_of, voters_with

SAVE_EVERY_S = 0.5
PROGRESS_EVERY_S = 10.0
QUOTES = '"""'
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
YOU = "You: "

COMMANDS = {
    "help": ("", "list the commands"),
    "stop": ("", "Ctrl-C stops an answer"),
    "retry": ("", "ask for another answer to the last message"),
    "new": ("", "begin a new conversation"),
    "others": ("", "write out the other samples of the last answer"),
    "system": ("[TEXT|none]", "show or set the system prompt"),
    "think": ("[auto|on|off|TOKENS]", "whether the model thinks first, and for how many tokens"),
    "budget": ("[TOKENS|LEAST-MOST|none]", "how many tokens of thought: at most, or from-to"),
    "samples": ("[N]", "draw several answers, of which the majority decides"),
    "speculate": ("[off|auto|lookup|mtp|draft]", "where drafts come from"),
    "shift": ("[on|off]", "whether the oldest turns are dropped where the context is full"),
    "thoughts": ("on|off", "whether the model's reasoning is written out"),
    "figures": ("", "what the last answer cost"),
    "save": ("[FILE]", "write the conversation to a Markdown file"),
    "quit": ("", "end; so does Ctrl-D"),
}


class Lines:
    """Reads lines from a user and writes to them, with editing and history where both sides are a terminal."""

    def __init__(self, source: TextIO, target: TextIO, *, colour: bool) -> None:
        self._source, self._target = source, target
        self._source_tty, self._target_tty = source.isatty(), target.isatty()
        self._editing = self._source_tty and self._target_tty and source is sys.stdin and target is sys.stdout
        self.colour = colour and self._target_tty
        self._at_start = True

    def edit_with(self, history: Sequence[str], words: Sequence[str]) -> None:
        """Offer earlier lines to the arrow keys and `words` to Tab, where lines are edited."""
        if not self._editing:
            return
        try:
            import readline
        except ImportError:
            return
        for line in history:
            readline.add_history(line)
        readline.set_completer_delims(" ")
        readline.set_completer(
            lambda text, at: next(iter([each for each in words if each.startswith(text)][at:]), None)
        )
        readline.parse_and_bind("tab: complete")

    def read(self, prompt: str) -> str | None:
        """Return a line without its end, or None at the end of the input. Raises KeyboardInterrupt."""
        self.new_line()
        if self._editing:
            try:
                return input(prompt)
            except EOFError:
                self._target.write("\n")
                return None
        # A prompt is for whoever types; the output gets it where that is all there is.
        shown = sys.stderr if self._source_tty else self._target
        shown.write(prompt)
        shown.flush()
        line = self._source.readline()
        if not line:
            self._target.write("\n")
            return None
        if not self._source_tty:
            self._target.write(clean(line if line.endswith("\n") else f"{line}\n"))
        return line.rstrip("\r\n")

    def write(self, text: str, *, dim: bool = False) -> None:
        """Write a piece of a line, or several, as it stands but for what a terminal would obey."""
        text = clean(text)
        if not text:
            return
        self._target.write(f"{DIM}{text}{PLAIN}" if dim and self.colour else text)
        self._target.flush()
        self._at_start = text.endswith("\n")

    def new_line(self) -> None:
        """Begin a new line unless one has just begun."""
        if not self._at_start:
            self.write("\n")

    def say(self, text: str) -> None:
        """Write a line of the chat's own."""
        self.new_line()
        self.write(text + "\n")


class PlainChat:
    """One conversation at a time over a backend. `store` keeps conversations; None keeps none."""

    def __init__(
        self,
        backend: Backend,
        model_name: str,
        lines: Lines,
        *,
        settings: Settings | None = None,
        adapter: str | None = None,
        store: Any = None,
        thoughts: bool = True,
    ) -> None:
        self._backend = backend
        self._name = model_name
        self._lines = lines
        self._settings = settings or Settings()
        self._adapter = adapter
        self._store = store
        self._thoughts = thoughts
        self._tree = Tree()
        self._conversation: str | None = None
        self._ready = False
        self._stopping = False
        self._ended = False
        self._last: Done | None = None
        self._begun_at = time.time()

    def run(self) -> None:
        """Hold the conversation until its user ends it; the backend is closed then."""
        say = self._lines.say
        say(f"Chat with {self._name}. /help lists the commands; Ctrl-C stops an answer; Ctrl-D ends.")
        if (unusual := held(self._settings)) is not None:
            say(f"With {unusual.long}.")
        for notice in getattr(self._store, "notices", ()):
            say(notice)
        history = self._store.history() if self._store is not None else []
        self._lines.edit_with([each for each in history if "\n" not in each], [f"/{name}" for name in COMMANDS])
        with asyncio.Runner() as runner:
            try:
                runner.run(self._load())
                while not self._ended and (text := self._read()) is not None:
                    self._take(text, runner)
            except KeyboardInterrupt:
                say("Ended.")
            finally:
                runner.run(self._backend.close())

    def _read(self) -> str | None:
        """Return a message, of several lines where it begins with three quotes; None at the end."""
        while True:
            try:
                line = self._lines.read(YOU)
                if line is None or not line.lstrip().startswith(QUOTES):
                    return line
                parts = [line.lstrip()[len(QUOTES) :]]
                while not parts[-1].rstrip().endswith(QUOTES):
                    more = self._lines.read("... ")
                    if more is None:
                        return None
                    parts.append(more)
                return "\n".join(parts).rstrip()[: -len(QUOTES)]
            except KeyboardInterrupt:
                self._lines.say("")
                self._lines.say("Ctrl-D or /quit ends the chat.")

    def _take(self, text: str, runner: asyncio.Runner) -> None:
        command = re.fullmatch(r"/([a-z]+)(?:\s+(.*))?", text, re.DOTALL)
        if command:
            self._obey(command[1], (command[2] or "").strip(), runner)
        elif text.strip():
            if self._store is not None:
                self._store.remember(text.strip())
            self._keep(self._tree.add(Node("user", text.strip(), parent=self._tree.head)))
            runner.run(self._answer())

    def _obey(self, name: str, argument: str, runner: asyncio.Runner) -> None:
        say = self._lines.say
        match "quit" if name == "exit" else name:
            case "help":
                for each, (argument, what) in COMMANDS.items():
                    say(f"/{each} {argument}".rstrip() + f": {what}.")
                say(f"A message of several lines begins and ends with {QUOTES}.")
            case "stop":
                say("No answer is running. Ctrl-C stops one.")
            case "quit":
                self._ended = True
            case "retry":
                self._retry(runner)
            case "new":
                self._tree, self._conversation, self._last, self._begun_at = Tree(), None, None, time.time()
                say("A new conversation.")
            case "system":
                self._set_system(argument)
            case "think" | "budget" | "samples" | "speculate" | "shift":
                self._dial(getattr(dials, name), argument)
            case "others":
                self._write_others()
            case "thoughts":
                if argument in ("on", "off"):
                    self._thoughts = argument == "on"
                say(f"Reasoning is {'written out' if self._thoughts else 'not written out'}.")
            case "figures":
                say(self._figures() or "Nothing has been answered yet.")
            case "save":
                self._save(argument)
            case _:
                near = get_close_matches(name, COMMANDS, n=1)
                hint = f"Did you mean /{near[0]}?" if near else "/help lists them."
                say(f"There is no command /{name}. {hint} Put a space before it to send it to the model.")

    def _retry(self, runner: asyncio.Runner) -> None:
        asked = [node for node in self._tree.path() if node.role == "user"] if self._tree.head else []
        if not asked:
            self._lines.say("There is no message to answer yet.")
            return
        self._tree.head = asked[-1].id
        runner.run(self._answer())

    def _set_system(self, text: str) -> None:
        if text:
            self._use(replace(self._settings, system=None if text == "none" else text))
        system = self._settings.system
        self._lines.say(f"System prompt: {system}" if system else "There is no system prompt.")

    def _use(self, settings: Settings) -> None:
        self._settings = settings
        if self._store is not None and self._conversation is not None:
            self._store.set_settings(self._conversation, settings)

    def _dial(self, dial: dials.Dial, words: str) -> None:
        """Turn one of the dials, or, with no words, only say how it stands."""
        try:
            if words:
                self._use(dial(self._settings, words))
            self._lines.say(dials.said(dial, self._settings))
        except UsageError as error:
            self._lines.say(str(error))

    def _write_others(self) -> None:
        shown = None if self._tree.head is None else self._tree[self._tree.head]
        others = [] if shown is None else [each for each in voters_with(shown) if each in self._tree]
        if len(others) < 2:
            self._lines.say("The last answer was not voted on; /samples 5 has five of them vote.")
        for id_ in others:
            if id_ != self._tree.head:
                self._lines.say(f"{tally_of(self._tree[id_])[0]}: {self._tree[id_].text.strip()}")

    def _figures(self) -> str:
        if self._last is None:
            return ""
        return SEPARATOR.join(" ".join(each.long.split()) for each in fields(self._last.figures, self._last.usage))

    def _save(self, name: str) -> None:
        from edger1.tui.store import Stored
        from edger1.tui.store.export import to_markdown

        if self._tree.head is None:
            self._lines.say("There is nothing to save yet.")
            return
        path = Path(name or time.strftime("edger1-chat-%Y%m%d-%H%M%S.md")).expanduser()
        stored = Stored(
            id=self._conversation or "",
            title=None,
            tree=self._tree,
            settings=self._settings,
            model=self._name,
            adapter=self._adapter,
            pinned=False,
            created_at=self._begun_at,
            updated_at=time.time(),
        )
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(to_markdown(stored, thoughts=self._thoughts))
            self._lines.say(f"Saved to {path}.")
        except FileExistsError:
            self._lines.say(f"{path} exists already; give another name.")
        except OSError as error:
            self._lines.say(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.")

    # The engine

    async def _load(self) -> None:
        say = self._lines.say
        say(f"Loading {self._name}.")
        told_at = began = time.monotonic()
        async with aclosing(_closable(self._backend.load())) as events:
            async for event in events:
                match event:
                    case Progress(done=done, total=total) if total and time.monotonic() - told_at >= PROGRESS_EVERY_S:
                        told_at = time.monotonic()
                        say(f"{done * 100 // total}% of {memory(total)}.")
                    case Loaded():
                        self._ready = True
                        say(f"Ready after {duration(time.monotonic() - began)}.")
                    case Failed(message=message):
                        say(f"The model could not be loaded. {message}")

    @property
    def _called(self) -> str:
        """What the model is called: of a folder or a hub's repository the last part."""
        return self._name.rstrip("/").rpartition("/")[2]

    async def _answer(self) -> None:
        """Answer the conversation up to the head of its tree; Ctrl-C stops it."""
        if not self._ready:
            await self._load()
            if not self._ready:
                return
        self._stopping = False
        if self._settings.samples > 1:
            await self._sample()
            return
        writer = _Answer(self._lines, self._called, self._thoughts)
        node = Node("assistant", parent=self._tree.head, model=self._name)
        messages = self._tree.messages(self._settings.system)
        saved_at = 0.0
        with self._interruptible():
            try:
                async with aclosing(_closable(self._backend.ask(messages, settings=self._settings))) as events:
                    async for event in events:
                        if isinstance(event, Text | Thought) and not self._stopping:
                            writer.take(event, node)
                            if time.monotonic() - saved_at >= SAVE_EVERY_S:
                                saved_at = time.monotonic()
                                self._keep(node)
                        elif isinstance(event, Done):
                            self._last = event
                            node.finish = "cancelled" if self._stopping else event.finish_reason
                            node.figures = {key: value for key, value in asdict(event).items() if key != "id"}
                            writer.end(REMARKS.get(node.finish, ""), *getattr(event, "notes", ()))
                        elif isinstance(event, Failed):
                            node.finish = "failed"
                            self._ready = event.error != "EngineError"
                            writer.end(
                                f"The answer failed. {event.message} Your conversation is kept; /retry asks again."
                            )
            except asyncio.CancelledError:
                node.finish, self._ended = "cancelled", True
                writer.end("Ended.")
        if node.text or node.thought:
            self._keep(node)

    async def _sample(self) -> None:
        """Answer by a vote of several samples."""
        nodes = [Node("assistant", parent=self._tree.head, model=self._name) for _ in range(self._settings.samples)]
        vote = PlainVote(self._lines, self._called, self._thoughts, self._keep)
        samples = vote.samples(nodes)
        asked = self._backend.ask(self._tree.messages(self._settings.system), settings=self._settings)
        with self._interruptible(samples.stop):
            try:
                end = await vote.hold(samples, asked)
            except asyncio.CancelledError:
                self._ended = True
                self._lines.say("Ended.")
                return
        if isinstance(end, Done):
            self._last = end
        elif isinstance(end, Failed):
            self._ready = end.error != "EngineError"
        if vote.shown is not None:
            self._show(vote.shown)

    def _show(self, node: Node) -> None:
        self._tree.head = node.id
        if self._store is not None and self._conversation is not None:
            self._store.set_head(self._conversation, node.id)

    @contextlib.contextmanager
    def _interruptible(self, stop: Callable[[], None] = lambda: None) -> Any:
        """Let Ctrl-C stop the answer, and a second one end the chat where the engine does not come to a stop.

        `stop` is called when it is stopped.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        before = signal.getsignal(signal.SIGINT)

        def interrupt() -> None:
            if self._stopping and task is not None:
                task.cancel()
            self._stopping = True
            stop()
            self._backend.cancel()

        loop.add_signal_handler(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)
            signal.signal(signal.SIGINT, before)

    def _keep(self, node: Node) -> None:
        """Put a message into the tree and the store, or what has been added to it since."""
        if node.id not in self._tree:
            self._tree.add(node)
        if self._store is None:
            return
        if self._conversation is None:
            self._conversation = self._store.create(model=self._name, adapter=self._adapter, settings=self._settings)
            self._kept: dict[str, tuple[int, int]] = {}
        if node.id not in self._kept:
            self._store.add(self._conversation, node)
            self._store.set_head(self._conversation, node.id)
        else:
            text, thought = self._kept[node.id]
            self._store.append(node.id, text=node.text[text:], thought=node.thought[thought:])
        self._kept[node.id] = (len(node.text), len(node.thought))
        if node.finish is not None:
            self._store.finish(node)


class _Answer:
    """Writes one answer: what is thought, then what is said, each begun with who says it."""

    def __init__(self, lines: Lines, name: str, thoughts: bool) -> None:
        self._lines, self._name, self._thoughts = lines, name, thoughts
        self._thinking_since: float | None = None

    def take(self, event: Text | Thought, node: Node) -> None:
        """Write a piece and add it to the message."""
        if isinstance(event, Thought):
            if self._thinking_since is None:
                self._thinking_since = time.monotonic()
                self._lines.new_line()
                self._lines.write("Thinking: " if self._thoughts else "Thinking.\n", dim=True)
            node.thought += event.text
            if self._thoughts:
                self._lines.write(event.text, dim=True)
            return
        text = event.text if node.text else event.text.lstrip()
        if not text:
            return
        if not node.text:
            if self._thinking_since is not None:
                node.thought_s = time.monotonic() - self._thinking_since
                self._lines.new_line()
                self._lines.say(f"Thought for {duration(node.thought_s)}, {len(node.thought.split()):,} words.")
            self._lines.new_line()
            self._lines.write(f"{self._name}: ")
        node.text += text
        self._lines.write(text)

    def end(self, *remarks: str) -> None:
        """End the answer, and say what has to be said of it."""
        self._lines.new_line()
        for remark in remarks:
            if remark:
                self._lines.say(remark)


async def _closable(events: Any) -> Any:
    """Pass events on as a generator that can be closed, whatever kind of iterator they come from."""
    async for event in events:
        yield event
