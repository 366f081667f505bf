"""The chat as the person before it has it: how soon it stands, opens, shows a key, and what it takes of the machine.

    python -m benchmarks.chat
    python -m benchmarks.chat --only start      # one part: start, open, keys, stream, idle, rate

The whole chat runs on a real terminal (a pseudo-terminal of 120 by 40) in a process of its own: Textual's own driver
reads the keys and writes the screen, and times are taken outside, from the key to the bytes for the screen. There is no
peer; each figure is held against what the chat promises, and the engine's rate against that of the engine alone. For
keys, streaming and opening a script stands in for the engine and gives 50 tokens a second.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import bench, common, peers
from benchmarks.bench import Bench, side
from benchmarks.chat_child import BEGUN, LAST, QUESTION
from benchmarks.chat_terminal import SilentError, Terminal, child, terminal
from benchmarks.common import Comparison, Measure, Side

START_S, OPEN_S, CPU_SHARE, KEY_MS, IDLE_SHARE, RATE = 1.0, 0.5, 0.15, 50.0, 0.002, 0.9
MESSAGES = 2_000
SCRIPTS = {
    "thinking": "a thought of 20 s",
    "code": "20 s of Markdown with code",
    "long": "20 s at the end of an answer of 4,000 tokens",
}
KEYS = [chr(0x430 + at) for at in range(32)]
"""Letters that the answers do not have, so that one on the screen is the key that was sent."""
PROMPT = b"sk anything"
"""The end of what the empty text box says; the cursor stands on its first letter."""
CHATS = b"\x0f"
"""Ctrl+O."""
TOOLS = """
[tools]
functions = ["tools.py"]

[mcp.none]
command = "true"
"""


@contextmanager
def scripted(script: str, seconds: float) -> Iterator[tuple[Terminal, Path]]:
    """Run the chat with a scripted engine and ask it; gives the terminal, once the answer comes, and its result."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        with terminal(child(Path(folder) / "chats.db", "script", told, script, seconds), 1) as up:
            up.wait(PROMPT)
            up.press(b"Go on\r")
            up.wait(BEGUN.strip().encode())
            yield up, told


def started(folder: Path, threads: int, tools: bool) -> dict[str, float]:
    """Start `edger1 chat`, and type a letter as soon as the text box is there; seconds until it is on the screen."""
    with tempfile.TemporaryDirectory() as home:
        models = Path(home) / "v1" / "models"
        models.mkdir(parents=True)
        (models / "smollm2-135m").symlink_to(folder)
        if tools:
            (Path(home) / "config.toml").write_text(TOOLS)
            (Path(home) / "tools.py").write_text('def add(a: int, b: int) -> int:\n    """Add."""\n    return a + b\n')
        edger1 = Path(sys.executable).with_name("edger1")
        with terminal([edger1, "chat"], threads, EDGER1_HOME=home) as up:
            up.wait(PROMPT)
            up.press(KEYS[0].encode())
            return {"seconds": up.wait(KEYS[0].encode()) - up.began}


def opened(store: Path) -> dict[str, float]:
    """Open a long conversation from the list; seconds from the key until its last word is on the screen."""
    told = store.with_name("told.json")
    with terminal(child(store, "script", told, "code", 1), 1) as up:
        up.wait(PROMPT)
        up.press(CHATS)
        up.wait(b"Long talk")
        up.watch(1.0)
        pressed = up.press(b"\r")
        return {"seconds": up.wait(LAST.encode()) - pressed}


def streamed(script: str, seconds: float) -> dict[str, float]:
    """Let an answer come for `seconds`; the share of one core that the chat's process took."""
    with scripted(script, seconds) as (up, told):
        up.watch(seconds + 60, told)
        found: dict[str, float] = json.loads(told.read_text())
        return found


def typed(script: str, seconds: float) -> dict[str, float]:
    """Press keys while an answer comes; milliseconds from each key to its letter among the bytes for the screen."""
    dice, took = random.Random(time.monotonic_ns()), []
    with scripted(script, seconds) as (up, _):
        until = time.monotonic() + seconds - 1.0
        while time.monotonic() < until:
            up.watch(dice.uniform(0.03, 0.12))
            key = KEYS[len(took) % len(KEYS)].encode()
            pressed = up.press(key)
            try:
                took.append((up.wait(key, seconds=5.0) - pressed) * 1e3)
            except SilentError:
                took.append(5_000.0)
    return {"p99": percentile(took, 0.99), "median": percentile(took, 0.5), "keys": float(len(took))}


def idled(seconds: float) -> dict[str, float]:
    """Leave the chat alone after an answer; the share of one core that its process took."""
    with scripted("code", 2.0) as (up, told):
        up.watch(60, told)
        # Its title, and the last of what is saved.
        up.watch(5.0)
        before, began = up.processor_s(), time.perf_counter()
        up.watch(seconds)
        return {"share": (up.processor_s() - before) / (time.perf_counter() - began)}


def answered(folder: Path, tokens: int, threads: int, chat: bool) -> dict[str, float]:
    """Ask a real engine the same question, in the chat or without it; its own account of its rate."""
    with tempfile.TemporaryDirectory() as place:
        told, store = Path(place) / "told.json", Path(place) / "chats.db"
        command = child(store, "engine" if chat else "bare", told, folder, tokens)
        if chat:
            with terminal(command, threads) as up:
                up.wait(PROMPT)
                up.press(QUESTION.encode() + b"\r")
                up.watch(120, told)
        else:
            environment = common.child_environment(threads)
            subprocess.run([str(word) for word in command], env=environment, cwd=common.REPOSITORY, check=True)
        found: dict[str, float] = json.loads(told.read_text())
        return found


def percentile(values: list[float], share: float) -> float:
    """Return the value that `share` of the values do not exceed."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def _held(what: str, ours: Side, most: float) -> Comparison:
    promise = Side("the promise", "at most", ours.unit, (most,))
    return Comparison(what, ours, promise, 1.0, less_is_better=True, form="share")


def measure_start(run: Bench) -> list[Comparison]:
    """Start the program."""
    folder = peers.smollm2_folder()
    cases = {"no tools": False, "tools": True}
    measures: dict[str, Measure] = {name: partial(started, folder, run.threads, tools) for name, tools in cases.items()}
    for each in measures.values():
        # Once uncounted, so that every file is in the page cache.
        each()
    readings = run.interleave(measures)
    settings = {"no tools": "SmolLM2-135M", "tools": "an MCP server and a function in config.toml"}
    return [
        _held(f"start to a key on the screen, {name}", side("EdgeR1", settings[name], found, "seconds", "s"), START_S)
        for name, found in readings.items()
    ]


def measure_open(run: Bench) -> list[Comparison]:
    """Open a long conversation."""
    messages = 200 if run.quick else MESSAGES
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "chats.db"
        subprocess.run(
            [str(word) for word in child(store, "fill", messages)],
            env=common.child_environment(1),
            cwd=common.REPOSITORY,
            check=True,
        )
        readings = run.interleave({"open": partial(opened, store)})["open"]
    return [_held("a conversation opens", side("EdgeR1", f"{messages:,} messages", readings, "seconds", "s"), OPEN_S)]


def measure_stream(run: Bench) -> list[Comparison]:
    """Take the processor's share while answers come."""
    seconds = 4.0 if run.quick else 20.0
    readings = run.interleave({script: partial(streamed, script, seconds) for script in SCRIPTS})
    return [
        _held(
            f"processor while streaming, {script}",
            side("EdgeR1", SCRIPTS[script], found, "share", "of one core"),
            CPU_SHARE,
        )
        for script, found in readings.items()
    ]


def measure_keys(run: Bench) -> list[Comparison]:
    """Take the time from a key to the screen while answers come."""
    seconds = 4.0 if run.quick else 20.0
    readings = run.interleave({script: partial(typed, script, seconds) for script in SCRIPTS})
    for script, found in readings.items():
        median = sorted(common.column(found, "median"))[len(found) // 2]
        run.notes.append(f"{script}: median {median:.1f} ms, {int(sum(common.column(found, 'keys')))} keys in all")
    return [
        _held(f"key to screen, 99th percentile, {script}", side("EdgeR1", SCRIPTS[script], found, "p99", "ms"), KEY_MS)
        for script, found in readings.items()
    ]


def measure_idle(run: Bench) -> list[Comparison]:
    """Take the processor's share while nothing happens."""
    readings = run.interleave({"idle": partial(idled, 3.0 if run.quick else 10.0)})["idle"]
    return [_held("processor while idle", side("EdgeR1", "10 s", readings, "share", "of one core"), IDLE_SHARE)]


def measure_rate(run: Bench) -> list[Comparison]:
    """Hold the engine's rate with the chat against that without it."""
    folder, tokens = peers.smollm2_folder(), 48 if run.quick else 256
    readings = run.interleave(
        {
            "chat": partial(answered, folder, tokens, run.threads, True),
            "bare": partial(answered, folder, tokens, run.threads, False),
        }
    )
    run.notes.append(f"answers of {int(readings['chat'][0]['tokens'])} and {int(readings['bare'][0]['tokens'])} tokens")
    return [
        Comparison(
            "decode with the chat / without it",
            side("EdgeR1", "the chat shows it", readings["chat"]),
            side("EdgeR1's engine", "nobody looks", readings["bare"]),
            RATE,
        )
    ]


PARTS = {
    "start": measure_start,
    "open": measure_open,
    "keys": measure_keys,
    "stream": measure_stream,
    "idle": measure_idle,
    "rate": measure_rate,
}

if __name__ == "__main__":
    raise SystemExit(bench.main("chat", __doc__, PARTS))
