"""`edger1 eval`: what a model has lost against the one it was made from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edger1.cli import options
from edger1.errors import UsageError


def evaluate_command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Alias, hub repository (owner/name), folder or .gguf file.")
    ],
    against: Annotated[str, typer.Option("--against", metavar="SOURCE", help="What it was made from; likewise.")],
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The text to predict, UTF-8.")],
    window: Annotated[int, typer.Option(metavar="TOKENS", help="Tokens of a window of the text.")] = 512,
    tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Measure on the first N tokens of the text. Default: all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the figures there, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw layers' errors and the divergences.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    offline: options.Offline = False,
) -> None:
    """Measure what a model has lost against the one it was made from.

    Perplexity of both on a text, the Kullback-Leibler divergence of the model's predictions from the
    source's (mean and 99th percentile), how often both think the same token likeliest, and each
    layer's relative error. One layer of each is in memory at a time, so neither model need fit.

    [bold]Examples[/bold]

      edger1 eval qwen3-30b-a3b --against Qwen/Qwen3-30B-A3B --text book.txt --tokens 8000

      edger1 eval ./my-4bit --against ./my-model --text book.txt --plot loss.png -o loss.json
    """
    from edger1 import worker
    from edger1.cli.loading import apply_threads
    from edger1.config import load_config
    from edger1.fetch.place import write_atomically
    from edger1.measuring import evaluate, read_text
    from edger1.quant.measure_report import check_plot, draw, table
    from edger1.sampling import check_count

    check_count("tokens", tokens)
    words = read_text(text)
    if plot is not None:
        check_plot(plot)
    config = load_config()
    apply_threads(config.threads)
    folder, source = (_find(name, offline or config.offline) for name in (model, against))
    found = worker.call(lambda: evaluate(folder, source, words, window=window, most_tokens=tokens, on_step=_show))
    written = json.dumps(found.as_json(), indent=1)
    if output is not None:
        try:
            write_atomically(output, written + "\n")
        except OSError as error:
            raise UsageError(f"{output} cannot be written: {(error.strerror or str(error)).lower()}.") from None
    if plot is not None:
        draw(plot, found)
    if json_:
        typer.echo(written)
    else:
        for line in table(found):
            typer.echo(line)


def _find(name: str, offline: bool) -> Path:
    """Return where a model is, fetching it where it is not on this machine. Files need not be converted."""
    from edger1.cli.loading import ensure_model

    path = Path(name).expanduser()
    if path.is_file() or any(path.glob("*.gguf")):
        return path
    return ensure_model(name, offline)


def _show(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        said = f"Layer {done} of {total}" if what == "layer" else f"Tokens compared: {done:,} of {total:,}"
        end = "\r\x1b[K" if what == "tokens" and done == total else ""
        print(f"\r\x1b[K{said}{end}", end="", file=sys.stderr, flush=True)
