"""The command line: one small file a command, each importing what it needs only when it runs."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Annotated, NoReturn

import typer

import edger1
from edger1.cli.chat import chat_command
from edger1.cli.convert import convert_command
from edger1.cli.data import data_command
from edger1.cli.demo import demo_command
from edger1.cli.distill import distill_command
from edger1.cli.doctor import doctor_command
from edger1.cli.evaluate import evaluate_command
from edger1.cli.export import export_command
from edger1.cli.finetune import finetune_command
from edger1.cli.fuse import fuse_command
from edger1.cli.models import models_app
from edger1.cli.pairs import pairs_command
from edger1.cli.plan import plan_command
from edger1.cli.pull import INTERRUPTED, pull_command
from edger1.cli.run import run_command
from edger1.cli.verify import verify_command
from edger1.errors import EdgeR1Error

app = typer.Typer(
    name="edger1",
    help="Run, reason with and train open-weight reasoning models on the computer you own.",
    epilog="Start with: edger1 chat",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"edger1 {edger1.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Run, reason with and train open-weight reasoning models on the computer you own."""
    if debug:
        os.environ["EDGER1_DEBUG"] = "1"


app.command("chat")(chat_command)
app.command("run")(run_command)
app.command("demo")(demo_command)
app.command("pull")(pull_command)
app.command("convert")(convert_command)
app.add_typer(models_app, name="models")
app.command("plan")(plan_command)
app.command("data")(data_command)
app.command("finetune")(finetune_command)
app.command("distill")(distill_command)
app.command("pairs")(pairs_command)
app.command("fuse")(fuse_command)
app.command("export")(export_command)
app.command("verify")(verify_command)
app.command("eval")(evaluate_command)
app.command("doctor")(doctor_command)


def main() -> None:
    """Run the command line: an error becomes one message on standard error and an exit code, never a traceback."""
    _open_standard_streams()
    try:
        app()
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
