"""The command line, called in this process as the installed program calls it, or in a process of its own.

A process takes three seconds of imports before it does anything, so a test starts one only for what a process alone can
show: signals, real pipes, environment variables that are read once, how a program ends.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def edger1(*arguments: str, stdin: str | None = None) -> Ran:
    """Run `edger1 ARGUMENTS` in this process; its streams are no terminal. Standard input is empty without `stdin`."""
    from edger1.cli import main

    out, err = _stream(), _stream()
    code: object = 0
    called = mock.patch.object(sys, "argv", ["edger1", *arguments])
    with _standard_input(stdin), called, redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    if not isinstance(code, int):
        raise TypeError(f"the command line ended with {code!r}; expected an exit code")
    return Ran(code, _said(out), _said(err))


def edger1_process(*arguments: str, stdin: str | None = None, **environment: str) -> Ran:
    """Run `python -m edger1 ARGUMENTS` as a process, with these environment variables beside the present ones."""
    done = subprocess.run(
        [sys.executable, "-m", "edger1", *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def refused(done: Ran, code: int, *words: str) -> None:
    """One sentence on standard error, the exit code, and nothing that looks like a traceback."""
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(("edger1: ", "Usage", "Error"))
    assert done.stdout == ""


def _stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="", write_through=True)


def _said(stream: io.TextIOWrapper) -> str:
    stream.flush()
    written = stream.buffer
    assert isinstance(written, io.BytesIO)
    return written.getvalue().decode("utf-8")


@contextmanager
def _standard_input(text: str | None) -> Iterator[None]:
    """Put a pipe with `text`, or the null device, in the place of file descriptor 0, which commands look at."""
    if text is None:
        source = os.open(os.devnull, os.O_RDWR)
    else:
        source, into = os.pipe()
        # A pipe holds 64 kB before writing into it waits for a reader.
        assert os.write(into, text.encode("utf-8")) < 1 << 16
        os.close(into)
    kept = os.dup(0)
    os.dup2(source, 0)
    os.close(source)
    try:
        with open(0, encoding="utf-8", closefd=False) as stream, mock.patch.object(sys, "stdin", stream):
            yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)
