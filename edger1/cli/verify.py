"""`edger1 verify`: show that a model computes the same with its experts streamed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edger1.cli import options
from edger1.errors import UsageError


def verify_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, hub repository (owner/name) or folder.")],
    precision: options.Precision = "fast",
    expert_slots: options.ExpertSlots = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the certificate there, as JSON.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the certificate.")] = False,
) -> None:
    """Show that a model's streamed output is its resident output, one layer at a time.

    Also for models that are larger than memory: a layer is loaded whole, computed with its experts resident and with
    them streamed on the same input, and given back. The certificate holds checksums of weights and outputs.

    Examples:

      edger1 verify nano-moe

      edger1 verify qwen3-30b-a3b --output certificate.json
    """
    from edger1 import worker
    from edger1.cli.loading import ensure_model
    from edger1.engine import PRECISIONS
    from edger1.experts.verify import verify
    from edger1.fetch.place import write_atomically

    if precision not in PRECISIONS:
        raise UsageError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}.")
    folder = ensure_model(model, offline=False)

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\r\x1b[K" if done == total else ""
            print(f"\rLayer {done} of {total}{end}", end="", file=sys.stderr, flush=True)

    certificate = worker.call(lambda: verify(folder, precision=precision, expert_slots=expert_slots, on_layer=show))
    text = json.dumps(certificate.as_json(), indent=1)
    if output is not None:
        try:
            write_atomically(output, text + "\n")
        except OSError as error:
            raise UsageError(f"{output} cannot be written: {(error.strerror or str(error)).lower()}.") from None
    if json_:
        typer.echo(text)
    else:
        misses = sum(c.misses for layer in certificate.layers for c in layer.outputs)
        typer.echo(
            f"{certificate.model}, {precision}: {len(certificate.layers)} layers, {misses:,} experts read from disk"
        )
        for layer in certificate.layers:
            if not layer.holds(precision):
                weights = layer.resident_weights_sha256 == layer.streamed_weights_sha256
                rows = [c.rows for c in layer.outputs if not c.same]
                typer.secho(
                    f"{layer.layer} differs: " + ("" if weights else "weights, ") + f"outputs of {rows} rows", fg="red"
                )
        for reason in {line for layer in certificate.layers for line in layer.not_compared}:
            typer.secho(f"Not compared with {reason}", fg="yellow")
        if certificate.holds:
            typer.secho("Streamed equals resident: weights and outputs of up to 16 rows bit for bit.", fg="green")
    if not certificate.holds:
        raise typer.Exit(1)
