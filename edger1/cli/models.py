"""`edger1 models`: what is on this machine, and what could be."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edger1.installed import Installed
    from edger1.registry import Entry

models_app = typer.Typer(no_args_is_help=False)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An installed model, alias, OWNER/NAME or path.")]
AllOption = Annotated[bool, typer.Option("--all", "-a", help="Also list what the registry knows and is not here.")]


@models_app.callback(invoke_without_command=True)
def default(context: typer.Context, as_json: JsonOption = False, everything: AllOption = False) -> None:
    """List the models on this machine; `--all` adds those that `edger1 pull` knows by name.

    Examples:

      edger1 models

      edger1 models --all

      edger1 models show qwen3-8b

      edger1 models rm qwen3-8b
    """
    if context.invoked_subcommand is None:
        list_models(as_json, everything)


@models_app.command("list")
def list_models(as_json: JsonOption = False, everything: AllOption = False) -> None:
    """List the models on this machine: size, quantization, architecture, last used."""
    from edger1 import installed, registry

    here = installed.models()
    names = {model.name for model in here}
    absent = [entry for entry in registry.load().values() if entry.alias not in names] if everything else []
    if as_json:
        rows = [_installed_json(model) for model in here] + [
            _entry_json(entry) | {"installed": False} for entry in absent
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    if here or absent:
        _print_table(here, absent)
    if all(model.source == "package" for model in here) and not absent:
        typer.echo("No model was fetched yet. `edger1 models --all` lists names, `edger1 pull NAME` fetches one.")


@models_app.command("show")
def show(
    name: NameArgument,
    as_json: JsonOption = False,
    load: Annotated[
        bool, typer.Option("--kernels", help="Load the model and tell how its layers run, and why not on more.")
    ] = False,
) -> None:
    """Show all that is known of one model, on this machine or in the registry.

    How its layers run on the CPU kernels is known from the last time it was loaded.
    """
    from edger1 import installed, registry, runs
    from edger1.errors import UnknownModelError

    entry = registry.find(name)
    model: Installed | None = None
    try:
        model = installed.get(name)
    except UnknownModelError:
        if entry is None:
            raise
    if load:
        from edger1.cli.loading import open_model

        with open_model(name, memory=None, context=None, precision="fast", offline=True):
            model = installed.get(name)
    ran = runs.of(model.path) if model else None
    if as_json:
        both = {
            "installed": None if model is None else _installed_json(model),
            "registry": None if entry is None else _entry_json(entry),
            "kernels": ran,
        }
        typer.echo(json.dumps(both, indent=2))
        return
    if model:
        _print_fields("On this machine", _installed_json(model))
    if ran:
        typer.echo(f"How it runs (loaded {_when(ran['when'])}, {ran['precision']})")
        for what, how in runs.lines(ran):
            typer.echo(f"  {what:<18}{how}" if what else f"  {how}")
    elif model and not model.problem:
        typer.echo(f"How it runs is known once it was loaded: edger1 models show {name} --kernels")
    if entry:
        _print_fields("In the registry", _entry_json(entry))
    if model is None:
        typer.echo(f"Not on this machine. Fetch it: edger1 pull {name}")


@models_app.command("path")
def path(name: NameArgument) -> None:
    """Print the model's folder."""
    from edger1 import installed

    typer.echo(str(installed.resolve(name)))


@models_app.command("rm")
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Installed models, or unfinished pulls.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove models. Of a model folder that lies elsewhere only the record goes."""
    from edger1 import installed
    from edger1.errors import UsageError
    from edger1.units import format_bytes

    if not yes:
        if not _can_ask():
            raise UsageError(f"Removing {', '.join(names)} wants a yes, and there is no terminal to ask on; add --yes.")
        if not typer.confirm(f"Remove {', '.join(names)}?"):
            raise typer.Exit(1)
    for name in names:
        freed = installed.remove(name)
        typer.echo(f"Removed {name}" + (f", {format_bytes(freed)} freed." if freed else "; its folder was left alone."))


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _installed_json(model: Installed) -> dict[str, Any]:
    return asdict(model) | {"path": str(model.path)}


def _entry_json(entry: Entry) -> dict[str, Any]:
    values = {"name": entry.alias} | asdict(entry)
    del values["alias"]
    values["sampling"] = {key: value for key, value in values["sampling"].items() if value is not None}
    values["sources"] = [
        {"kind": type(source).__name__.removesuffix("Source").lower()}
        | {key: value for key, value in asdict(source).items() if value is not None}
        for source in entry.sources
    ]
    return values


def _print_fields(title: str, values: dict[str, Any]) -> None:
    shown = {key: value for key, value in values.items() if value not in (None, False, 0, [], (), {})}
    typer.echo(title)
    for key, value in shown.items():
        typer.echo(f"  {key.replace('_', ' '):<18}{_text(key, value)}")


def _text(key: str, value: Any) -> str:
    from edger1.units import format_bytes

    if key == "bytes":
        return format_bytes(value)
    if key in ("parameters", "active_parameters"):
        return _count(value)
    if key == "sources":
        parts = ("kind", "repo", "package", "folder", "file")
        return "; ".join(" ".join(str(table[part]) for part in parts if part in table) for table in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items() if part is not None)
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _count(parameters: int) -> str:
    for factor, unit in ((10**9, "B"), (10**6, "M")):
        if parameters >= factor:
            return f"{parameters / factor:.3g}{unit}"
    return str(parameters)


def _print_table(here: list[Installed], absent: list[Entry]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from edger1.units import format_bytes

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "size", "quantization", "architecture", "last used"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for model in here:
        used = f"damaged: {model.problem}" if model.problem else _when(model.last_used)
        table.add_row(model.name, format_bytes(model.bytes), model.quantization or "", model.architecture or "", used)
    for entry in absent:
        size = format_bytes(entry.bytes) if entry.bytes else ""
        table.add_row(entry.alias, size, "", entry.architecture or "", "not here", style="dim")
    # A pipe gets whole lines, not ones wrapped at 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def _when(moment: str | None) -> str:
    from datetime import UTC, datetime

    if moment is None:
        return "never"
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except (ValueError, TypeError):
        return moment
    for size, unit in ((86400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
