"""The command line: one small file a command, each importing what it needs only when it runs."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import edger1
from edger1.cli.chat import chat_command
from edger1.cli.doctor import doctor_command
from edger1.cli.models import models_app
from edger1.cli.pull import pull_command
from edger1.cli.run import run_command
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
app.command("pull")(pull_command)
app.add_typer(models_app, name="models")
app.command("doctor")(doctor_command)


def main() -> None:
    """Run the command line: an error becomes one message on standard error and an exit code, never a traceback."""
    try:
        app()
    except EdgeR1Error as error:
        if os.environ.get("EDGER1_DEBUG"):
            raise
        print(f"edger1: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("EDGER1_DEBUG"):
            raise
        print(
            f"edger1: failed inside ({type(error).__name__}: {error}). This is a bug; run it again as "
            f"'edger1 --debug ...' and report what it prints.",
            file=sys.stderr,
        )
        sys.exit(1)
