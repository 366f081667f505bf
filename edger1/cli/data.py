"""`edger1 data`: how a dataset is understood, and what would be learned from it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edger1.train.datasets.template import Template


def data_command(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A JSONL, JSON, CSV or Parquet file, or a folder.")],
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Render and count with this model's template.")
    ] = None,
    format_: Annotated[
        str | None, typer.Option("--format", metavar="KIND", help="Read all rows as this kind; docs/data.md has them.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out, and count them.")] = False,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens a document may have.")] = 2048,
    samples: Annotated[int, typer.Option(metavar="N", help="How many rows to show.")] = 3,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show how a dataset is read and, with --model, what a training would learn from it.

    What is learned is shown bold, what is only read dim.

    Examples:

      edger1 data traces.jsonl

      edger1 data traces.jsonl --model nano-moe --length 4096
    """
    from rich.console import Console
    from rich.rule import Rule

    from edger1.errors import FormatError
    from edger1.train.datasets.reading import read
    from edger1.train.datasets.samples import chosen_rows, marked, plain
    from edger1.train.datasets.statistics import describe

    dataset = read(data, kind=format_, skip_bad=skip_bad)
    template = None if model is None or dataset.kind == "prompt" else _template(model, length)
    encoding = None
    if template is not None:
        rows = dataset.rows
        if dataset.kind == "preference":
            rows = [row for pair in map(template.pair, rows) for row in pair]
        encoding = template.encode_all(rows)
    figures = describe(dataset.rows, encoding)
    if json_:
        about: dict[str, Any] = {"kind": dataset.kind, "files": dataset.files, "bad": dataset.bad_count}
        typer.echo(json.dumps(about | asdict(figures), indent=1, ensure_ascii=False))
        return
    console = Console()
    for line in (dataset.describe(), *figures.lines()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for row in chosen_rows(dataset.rows, samples):
        console.print(Rule(row.where, style="dim"))
        try:
            shown = row if template is None or dataset.kind != "preference" else template.pair(row)[0]
            console.print(plain(row) if template is None else marked(template.pieces(shown)), soft_wrap=True)
        except FormatError as error:
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)


def _template(model: str, length: int) -> Template:
    from edger1.cli.loading import ensure_model
    from edger1.mlx_runtime import prepare
    from edger1.train.datasets.template import Template

    folder = ensure_model(model, offline=False)
    prepare()
    from mlx_lm.utils import load_tokenizer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return Template(load_tokenizer(folder, eos_token_ids=config.get("eos_token_id")), length)
