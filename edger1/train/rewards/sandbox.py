"""Programs that a model wrote, run in a subprocess with limits.

A program gets a process group of its own, a temporary folder as its current one, an environment without the user's
variables, and limits on CPU time, memory, files, processes and output; after `wall_s` it is killed with everything it
started. On Linux, where the kernel allows user namespaces, it also has no network, sees no other processes, and can
write nowhere but into its folder, which lies in memory; `SandboxResult.guards` says what was there. The kernel sets
root no limit on processes: a program of root's runs as nobody, or may start none, or is refused. It can read what
the user can. This holds off accidents and careless programs of a model, not an attack on the kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edger1.errors import UsageError

_JAIL = Path(__file__).with_name("jail.py")
_DISK_BYTES = 64 * 2**20
_RESULT = "result.txt"

# Runs each test on its own after the program, and notes which passed. The program is in the same process: one that was
# made to cheat can.
_HARNESS = """
import json, sys
def main():
    import builtins
    tests = json.load(open("tests.json", encoding="utf-8"))
    scope = {"__name__": "program"}
    source = open("program.py", encoding="utf-8").read()
    out = open("result.txt", "w")
    exec(compile(source, "program.py", "exec"), scope)
    for number, test in enumerate(tests):
        try:
            exec(compile(test, f"test {number + 1}", "exec"), scope)
            out.write(f"{number} ok\\n")
        except builtins.BaseException as error:
            out.write(f"{number} failed\\n")
            print(f"test {number + 1}: {type(error).__name__}: {error}", file=sys.stderr)
            if isinstance(error, builtins.KeyboardInterrupt):
                raise
        out.flush()
main()
"""


@dataclass(frozen=True)
class Limits:
    """What a program may take."""

    wall_s: float = 10.0
    cpu_s: float = 5.0
    memory_bytes: int = 512 * 2**20
    """Of each of its processes."""
    file_bytes: int = 16 * 2**20
    """Of each file."""
    processes: int = 8
    output_bytes: int = 65536


LIMITS = Limits()


@dataclass(frozen=True)
class SandboxResult:
    """What a program did."""

    passed: int
    total: int
    ended: str
    """How the last program ended: "exit 0", "exit 1", "SIGXCPU", "timeout", "too much output"."""
    output: str
    """Standard output and error of the first program with a test that failed, else of the last, up to the limit."""
    guards: tuple[str, ...]
    """What the kernel took away beside the limits: "network", "processes" (of others), "files" (outside its folder).

    For root, whom the kernel limits less, also "user" (it runs as nobody) or "forks" (it can start no process at all).
    """

    @property
    def share(self) -> float:
        """The share of tests that passed."""
        return self.passed / self.total if self.total else 0.0


def run(code: str, tests: Any, limits: Limits = LIMITS) -> SandboxResult:
    """Run Python `code` against `tests`.

    `tests`: text with assertions, which is one test; a list of such texts; or a list of {"input": ..., "output": ...}
    for programs that read standard input and write standard output, which are compared up to blanks at the ends of
    lines. JSON text of these is taken as well. Raises UsageError for other tests, and where there is no sandbox.
    """
    if sys.platform == "win32":
        raise UsageError("Programs cannot be run with limits on this system; there is a sandbox on Linux and macOS.")
    tests = _read_tests(tests)
    if isinstance(tests[0], str):
        return _run_assertions(code, tests, limits)
    return _run_dialogues(code, tests, limits)


def _read_tests(tests: Any) -> list[Any]:
    if isinstance(tests, str):
        with contextlib.suppress(ValueError):
            if isinstance(loaded := json.loads(tests), list):
                tests = loaded
    if isinstance(tests, str) and tests.strip():
        return [tests]
    texts = isinstance(tests, list) and all(isinstance(test, str) for test in tests)
    pairs = isinstance(tests, list) and all(isinstance(test, dict) and "output" in test for test in tests)
    if not tests or not (texts or pairs):
        raise UsageError(
            f"The tests of a program are {tests!r:.100}; expected text with assertions, a list of such texts, or a "
            'list of {"input": ..., "output": ...}.'
        )
    return list(tests)


def _run_assertions(code: str, tests: Sequence[str], limits: Limits) -> SandboxResult:
    files = {"program.py": code, "tests.json": json.dumps(tests), "main.py": _HARNESS}
    ended, output, report = _run_once(files, "", limits)
    lines = set(str(report.get("result", "")).splitlines())
    passed = sum(f"{number} ok" in lines for number in range(len(tests)))
    return SandboxResult(passed, len(tests), ended, output, tuple(report.get("guards", ())))


def _run_dialogues(code: str, tests: Sequence[dict[str, Any]], limits: Limits) -> SandboxResult:
    passed, shown, ended = 0, "", ""
    guards: tuple[str, ...] = ()
    failed = False
    for test in tests:
        ended, output, report = _run_once({"main.py": code}, str(test.get("input", "")), limits, split=True)
        guards = tuple(report.get("guards", ()))
        written, _, complaint = output.partition("\0")
        good = ended == "exit 0" and _lines(written) == _lines(str(test["output"]))
        passed += good
        if not failed:
            shown = written + complaint
        failed = failed or not good
    return SandboxResult(passed, len(tests), ended, shown, guards)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _run_once(
    files: dict[str, str], words: str, limits: Limits, split: bool = False
) -> tuple[str, str, dict[str, Any]]:
    """Run main.py of `files` with `words` on standard input; return how it ended, what it wrote, the jail's report.

    With `split`, standard output and error are apart, a NUL between them.
    """
    folder = Path(tempfile.mkdtemp(prefix="edger1-program-")).resolve()
    reading, writing = os.pipe()
    try:
        request = {
            "folder": str(folder),
            "files": files | {"stdin.txt": words},
            "stdin": "stdin.txt",
            "result": _RESULT,
            "limits": asdict(limits),
            "disk_bytes": _DISK_BYTES,
            "command": [sys.executable, "-I", "-B", "main.py"],
            "environment": {
                "PATH": "/usr/bin:/bin",
                "HOME": str(folder),
                "TMPDIR": str(folder),
                "LANG": "C.UTF-8",
                "PYTHONIOENCODING": "utf-8",
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
        }
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_JAIL), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if split else subprocess.STDOUT,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        writing = -1
        ended, output = _watch(process, json.dumps(request).encode(), limits)
        report: dict[str, Any] = {}
        os.set_blocking(reading, False)
        with contextlib.suppress(BlockingIOError, ValueError):
            for line in os.read(reading, 8 * limits.output_bytes + 4096).splitlines():
                report |= json.loads(line)
        if report.get("refused"):
            raise UsageError(f"Programs are not run here: {report['refused']}.")
        if not ended:
            ended = _named(report.get("code"))
        return ended, output, report
    finally:
        for descriptor in (reading, writing):
            if descriptor >= 0:
                os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _watch(process: subprocess.Popen[bytes], request: bytes, limits: Limits) -> tuple[str, str]:
    """Read what a process writes until it ends, its time is over, or it wrote too much; then kill its group."""
    deadline = time.monotonic() + limits.wall_s
    streams = [stream for stream in (process.stdout, process.stderr) if stream is not None]
    texts: dict[int, bytearray] = {stream.fileno(): bytearray() for stream in streams}
    ended = ""
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.close()
        with selectors.DefaultSelector() as waiting:
            for stream in streams:
                waiting.register(stream, selectors.EVENT_READ)
            while waiting.get_map() and not ended:
                left = deadline - time.monotonic()
                if left <= 0:
                    ended = "timeout"
                    break
                # A process that went into the background may hold the pipes open after the program's end.
                if process.poll() is not None:
                    left = 0.0
                ready = waiting.select(min(left, 0.05))
                if not ready and process.returncode is not None:
                    break
                for key, _ in ready:
                    piece = os.read(key.fd, 65536)
                    texts[key.fd] += piece
                    if not piece:
                        waiting.unregister(key.fileobj)
                if sum(map(len, texts.values())) > limits.output_bytes:
                    ended = "too much output"
        while not ended and process.poll() is None:
            if time.monotonic() > deadline:
                ended = "timeout"
            time.sleep(0.002)
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in streams:
            stream.close()
    written = [bytes(text[: limits.output_bytes]).decode("utf-8", "replace") for text in texts.values()]
    return ended, "\0".join(written)


def _named(code: Any) -> str:
    if code is None:
        return "no report"
    if code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit {code}"
