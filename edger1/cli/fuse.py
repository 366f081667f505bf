"""`edger1 fuse`: a model with an adapter in its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edger1.cli.options import Offline


def fuse_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, hub repository (owner/name) or folder.")],
    adapter: Annotated[Path, typer.Option("--adapter", metavar="DIR", help="The adapter's folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The new model's folder.")],
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Leave the weights unquantized, so that nothing is rounded away.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Write a model with an adapter fused into its weights.

    Weights that are quantized are quantized again in the same way, which rounds a part of the adapter away; how much is
    printed. With --dequantize the whole model gets 16 bits a weight, and nothing is lost but their rounding.

    Examples:

      edger1 fuse smollm2-135m --adapter runs/mine/adapter --output mine

      edger1 fuse smollm2-135m --adapter runs/mine/adapter --output mine-16bit --dequantize
    """
    from edger1 import worker
    from edger1.cli.loading import ensure_model

    folder = ensure_model(model, offline)

    def work() -> str:
        from edger1.mlx_runtime import prepare

        prepare()
        from edger1.train.adapters.export import write_mlx

        fused = write_mlx(output, folder, adapter, dequantize=dequantize)
        return fused.describe() if fused is not None else ""

    typer.echo(f"{output}: {worker.call(work)}")
