"""`edger1 export`: a model, or an adapter, for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edger1.cli.options import Offline
from edger1.errors import UsageError

FORMATS = ("mlx", "hf", "gguf")


def export_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, hub repository (owner/name) or folder.")],
    to: Annotated[str, typer.Option("--to", metavar="mlx|hf|gguf", help="For mlx-lm, transformers or llama.cpp.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PATH", help="The new folder, or the .gguf file.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="An adapter to fuse into the weights.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="With --to hf: the adapter alone, as PEFT loads it.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Write a model for other programs.

    mlx keeps the weights quantized as they are; an adapter is fused into them. hf and gguf have plain 16-bit weights:
    hf under the names of the hub's checkpoints, gguf (Llama, Qwen2 and Qwen3) as F16, which llama.cpp can quantize.

    Examples:

      edger1 export smollm2-135m --adapter runs/mine/adapter --to gguf --output mine.gguf

      edger1 export smollm2-135m --adapter runs/mine/adapter --to hf --adapter-only --output mine-peft
    """
    from edger1 import worker
    from edger1.cli.loading import ensure_model

    if to not in FORMATS:
        raise UsageError(f"--to is {to!r}; expected one of {', '.join(FORMATS)}.")
    if adapter_only and (to != "hf" or adapter is None):
        raise UsageError("--adapter-only goes with --to hf and --adapter.")
    if to == "gguf" and output.suffix != ".gguf":
        raise UsageError(f"--output {output} is to be a GGUF file; give a name that ends in .gguf.")
    folder = ensure_model(model, offline)

    def work() -> str:
        from edger1.mlx_runtime import prepare

        prepare()
        from edger1.train.adapters import export
        from edger1.train.adapters.gguf_file import write_gguf

        if adapter_only and adapter is not None:
            return export.write_peft(output, folder, adapter, model)
        if to == "mlx":
            fused = export.write_mlx(output, folder, adapter)
        else:
            fused = (export.write_hf if to == "hf" else write_gguf)(output, folder, adapter)
        return "written" if fused is None else fused.describe()

    typer.echo(f"{output}: {worker.call(work)}")
