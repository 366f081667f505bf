"""The command line: one small file a command, each importing what it needs only when it runs."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from edger1.errors import EdgeR1Error

if TYPE_CHECKING:
    import typer

    from edger1.cli.commands import app

__all__ = ["INTERRUPTED", "app", "main"]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C has ended."""


def __getattr__(name: str) -> Any:
    if name == "app":
        from edger1.cli.commands import app

        return app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the command line: an error becomes one message on standard error and an exit code, never a traceback."""
    _open_standard_streams()
    try:
        if not _at_once():
            _wanted()()
    except EdgeR1Error as error:
        _end(error, str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _leave()
        raise
    except OSError as error:
        what = error.filename or "The output"
        _end(error, f"{what} cannot be read or written: {(error.strerror or str(error)).lower()}.", 1)
    except Exception as error:
        bug = f"failed inside ({type(error).__name__}: {error}). This is a bug; run it again as 'edger1 --debug ...'"
        _end(error, f"{bug} and report what it prints.", 1)


def _at_once() -> bool:
    """Open the chat where nothing but that is asked for: reading a command line takes a tenth of its start."""
    if sys.argv[1:] != ["chat"]:
        return False
    from edger1.cli.chat_window import open_usual

    return open_usual()


def _wanted() -> typer.Typer:
    """Return the command line; where the chat is asked for, it alone: the others' options take a while to make."""
    if sys.argv[1:2] != ["chat"]:
        from edger1.cli.commands import app

        return app
    from edger1.cli.chat import chat_command
    from edger1.cli.program import QuickCommand, program

    chat = program()
    chat.command("chat", cls=QuickCommand)(chat_command)
    return chat


def _end(error: Exception, message: str, code: int) -> NoReturn:
    if os.environ.get("EDGER1_DEBUG"):
        raise error
    print(f"edger1: {message}", file=sys.stderr)
    sys.exit(code)


def _leave() -> NoReturn:
    """End at once after Ctrl-C: a step of the engine, which a normal exit waits for, may take seconds."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(INTERRUPTED)


def _open_standard_streams() -> None:
    """Open those of the three standard streams that are closed: the next file would get their number, and MLX reads
    none that has number 0."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
