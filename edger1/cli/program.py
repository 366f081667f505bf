"""The command line without its commands: what `edger1 --help` says, and the options before a command."""

from __future__ import annotations

import os
from functools import partial
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import edger1


def program() -> typer.Typer:
    """Return a command line that has no command yet."""
    made = typer.Typer(
        name="edger1",
        cls=QuickGroup,
        help="Run, reason with and train open-weight reasoning models on the computer you own.",
        epilog="Start with: edger1 chat",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(options)
    return made


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"edger1 {edger1.__version__}")
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Run, reason with and train open-weight reasoning models on the computer you own."""
    if debug:
        os.environ["EDGER1_DEBUG"] = "1"


class _Quick:
    """A command that begins at once: what was left out, and what is text anyhow, is not handed to Typer's conversion,
    which would import Pydantic for it."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, each made quick."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if "process_value" not in vars(param) and not param.required and not param.multiple and param.nargs == 1:
                param.process_value = partial(_process, param, param.process_value)
        return params


class QuickCommand(_Quick, TyperCommand):
    """A command that begins at once."""


class QuickGroup(_Quick, TyperGroup):
    """Commands of which each begins at once."""


def _process(param: Any, usual: Any, ctx: Any, value: Any) -> Any:
    text = getattr(getattr(param, "type_descriptor", None), "annotation", None) is str and isinstance(value, str)
    if value is not None and not text:
        return usual(ctx, value)
    return value if param.callback is None else param.callback(ctx, param, value)
