"""What the parts of `benchmarks.streaming` share: the model, what it is asked, and its sides within their limits."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import peers_streaming, sides_streaming
from benchmarks.bench import Bench
from benchmarks.cgroup import Limited
from benchmarks.common import child_environment
from benchmarks.peers import LlamaSettings
from benchmarks.random_moe import SHAPES, RandomMoe
from benchmarks.sides_streaming import letters
from benchmarks.worker import Side as Worker

PRECISION = "fast"
MODEL = "qwen3-24"
NAMES = {"olmoe": "OLMoE 1B-7B"}
GENERATE = 16
WORDS = (
    "time people water house light world music story day year hand book city school river night stone garden winter"
    " summer morning mother father friend paper window street village mountain forest letter"
)
OPENINGS = tuple(f" {word}" for word in WORDS.split())
"""Words of one token, more of them than the engine remembers prompts."""
Reading = dict[str, float]


@dataclass(frozen=True)
class Task:
    """An answer to ask for: a prompt and what must follow it, as text and as ids."""

    prompt: str
    prompt_ids: list[int]
    ids: list[int]
    text: str


class Subject:
    """The model that is measured, in every form, and prompts for it."""

    def __init__(self, name: str) -> None:
        from tokenizers import Tokenizer

        self.model = RandomMoe(SHAPES[name])
        self.folder = self.model.folder()
        self.nbytes = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        self._tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self._asked = 0

    def task(self, generate: int = GENERATE, words: int = 8) -> Task:
        """Return the next task: another prompt each time, of so many tokens, so that no cached prefix fits."""
        number, self._asked = self._asked, self._asked + 1
        count = len(OPENINGS)
        turned = [OPENINGS[(number * 7 + i) % count] for i in range(words - 1)]
        prompt = "".join([*turned, OPENINGS[(number * 3 + number // count) % count]])
        prompt_ids = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        ids = self.model.text.recited(prompt_ids[-1], generate + 1)
        return Task(prompt, prompt_ids, ids, self._tokenizer.decode(ids))


_MEASURED: ContextVar[str] = ContextVar("measured", default=MODEL)


@contextmanager
def measured(name: str) -> Iterator[None]:
    """Let all parts inside be about the model of another shape."""
    token = _MEASURED.set(name)
    try:
        yield
    finally:
        _MEASURED.reset(token)


def current() -> str:
    """Return the name of the shape that is being measured."""
    return _MEASURED.get()


def subject(name: str | None = None) -> Subject:
    """Return the model of a shape, made once; by default the one that is being measured."""
    return _made(name or _MEASURED.get())


@cache
def _made(name: str) -> Subject:
    return Subject(name)


def label(what: str) -> str:
    """Return what is compared, with the model's name where it is not the usual one."""
    name = _MEASURED.get()
    return what if name == MODEL else f"{NAMES[name]}, {what}"


CONTEXTS = {"olmoe": 544}
"""Tokens of context that EdgeR1 plans for where it is not the usual number: OLMoE has as many heads for keys as for
queries, and a context of 2,048 would take more than half of a quarter of its size."""


@contextmanager
def edger1(
    run: Bench, group: Limited, known: Path | None = None, of: str | None = None, **arguments: Any
) -> Iterator[Worker]:
    """Bring EdgeR1 up inside a group. Raises SideUnavailableError where it ends or is killed.

    It has never seen the model before, unless it is `known`: a folder of `sides_streaming.fresh` that it has used.
    """
    with tempfile.TemporaryDirectory() as new:
        folder = known or sides_streaming.fresh(subject(of).folder, Path(new))
        given = {"folder": folder, "precision": PRECISION, **arguments}
        if (of or current()) in CONTEXTS:
            given.setdefault("context", CONTEXTS[of or current()])
        environment = child_environment(run.threads)
        with Worker("benchmarks.sides_streaming:edger1", given, environment, within=group.command) as worker:
            yield worker


@contextmanager
def nunspark(run: Bench, group: Limited, settings: peers_streaming.NunsparkSettings) -> Iterator[Worker]:
    """Bring nunspark up inside a group."""
    given = {"packed": packed(), "settings": json.dumps(asdict(settings))}
    with Worker(
        "benchmarks.sides_streaming:nunspark",
        given,
        peers_streaming.nunspark_environment(run.threads),
        python=peers_streaming.nunspark_python(),
        within=group.command,
    ) as worker:
        yield worker


def packed() -> Path:
    """Return the model as nunspark has it."""
    return peers_streaming.nunspark_packed(subject().folder)


def asked(worker: Worker, task: Task) -> Reading:
    """Ask EdgeR1."""
    return worker.measure(prompt=task.prompt, generate=len(task.ids) - 1, text=task.text)


def asked_nunspark(worker: Worker, task: Task) -> Reading:
    """Ask nunspark."""
    return worker.measure(prompt=task.prompt_ids, generate=len(task.ids) - 1, tokens=task.ids)


def asked_llama(run: Bench, settings: LlamaSettings, task: Task, group: Limited) -> Reading:
    """Ask llama.cpp, in a process that ends with the answer."""
    gguf, generate = subject().model.gguf_file(), len(task.ids) - 1
    done = peers_streaming.llama_completion(gguf, settings, task.prompt, generate, threads=run.threads, group=group)
    return {"rate": done.decode, "prefill": done.prefill, "recited": float(letters(done.text) == letters(task.text))}


def new(run: Bench, limit_bytes: int) -> Limited:
    """Return a group that stays until the part ends."""
    group: Limited = run.enter(Limited(limit_bytes))
    return group


def read_ahead_kb(path: Path) -> int | None:
    """Return how far the kernel reads ahead on the disk that holds `path`, in KB; None where that is not told.

    A page missing from a memory map brings as much with it, which an mmap under a tight limit then throws away.
    """
    device = path.stat().st_dev
    told = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/queue/read_ahead_kb")
    return int(told.read_text()) if told.exists() else None


def share(percent: int) -> int:
    """Return so much of the model's size, in bytes."""
    return subject().nbytes * percent // 100


class Turns:
    """Gives every side the same tasks, one a round."""

    def __init__(self, generate: int = GENERATE) -> None:
        self._generate = generate
        self._tasks: list[Task] = []
        self._taken: dict[str, int] = defaultdict(int)

    def next(self, name: str) -> Task:
        """Return the next task of a side."""
        number = self._taken[name]
        self._taken[name] += 1
        if number == len(self._tasks):
            self._tasks.append(subject().task(self._generate))
        return self._tasks[number]
