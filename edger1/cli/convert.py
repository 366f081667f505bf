"""`edger1 convert`: turn a published model into a quantized one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edger1.cli import INTERRUPTED
from edger1.cli.options import Offline
from edger1.cli.pull import reporting
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.fetch import Watch
    from edger1.fetch.quantize import Wanted
    from edger1.quant.recipes import Recipe


BUILTIN = "builtin"
"""What stands for the calibration text of the package."""


def convert_command(
    source: Annotated[
        str, typer.Argument(metavar="PATH|ALIAS|REPO", help="A model folder, a .gguf file, an alias or OWNER/NAME.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Where to. Default: among the installed models.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Which weights get how many bits; see below.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(metavar="N", help="The same for every weight: 2, 3, 4, 5, 6 or 8 bits.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="With --bits: weights that share a scale, 32, 64 or 128.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Bits by measured sensitivity, so that it runs under this much memory."),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|builtin",
            help="Fit scales and codes to what a text or a .jsonl data set makes of the inputs; builtin is a text that "
            "comes along.",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Measure afterwards what was lost; writes report.json beside the model.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be made, and write nothing.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted conversion left, and begin anew.")
    ] = False,
    zero_nonfinite: Annotated[
        bool, typer.Option("--zero-nonfinite", help="Make zeros of NaN and infinities instead of refusing them.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Default: one more than processors, five at most.")
    ] = None,
    offline: Offline = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the folder and nothing else.")] = False,
) -> None:
    """Turn a published model into a quantized one, in a fixed amount of memory.

    Takes safetensors in bf16, f16, f32, FP8, MXFP4, NVFP4, GPTQ, AWQ or MLX's formats, and GGUF of every type. What
    MLX can hold as it is gets carried over without loss. From the hub, weight files come one at a time and are removed
    when they are past. An interrupted conversion goes on when it is started again. The folder's path goes to standard
    output; what became of each tensor stands in its conversion.json.

    Recipes: balanced (about 4.8 bits a weight), small (3.8), r1-small (routed experts at 2 and 3 bits), 2bit to 8bit,
    mxfp4, keep (nothing is quantized that is not so already), or a .json file of your own.

    Examples:

      edger1 convert deepseek-r1-distill-qwen-7b

      edger1 convert Qwen/Qwen3-8B --bits 5

      edger1 convert ./my-model --recipe small --to ./my-model-small

      edger1 convert ./my-model --bits 4 --calibrate builtin --report

      edger1 convert ./model-Q4_K_M.gguf --recipe keep --plan
    """
    chosen = _recipe(recipe, bits, group_size)
    from edger1.config import load_config
    from edger1.fetch.quantize import Calibration, Wanted, convert, describe
    from edger1.quant.converting import Settings
    from edger1.units import parse_size

    if fit is not None and chosen is not None:
        raise UsageError("--fit chooses the bits itself; give it without --recipe and --bits.")
    text = None if calibrate in (None, BUILTIN) else Path(str(calibrate))
    calibration = Calibration(text, None if fit is None else parse_size(fit)) if calibrate or fit else None
    wanted = Wanted(source, to, chosen, offline or load_config().offline, calibration)
    if threads is not None and not 1 <= threads <= 64:
        raise UsageError(f"--threads is {threads}; expected 1 to 64.")
    settings = Settings(zero_nonfinite=zero_nonfinite, restart=restart, threads=threads)
    # What cannot be measured is said before hours of converting.
    against = _against(wanted) if report and not plan else None
    try:
        with reporting(quiet) as watch:
            if plan:
                for line in describe(wanted, watch):
                    typer.echo(line)
                return
            folder = convert(wanted, settings, watch)
        typer.echo(str(folder))
        if against is not None:
            with reporting(quiet) as watch:
                _measure(wanted, *against, folder, watch)
    except KeyboardInterrupt:
        typer.echo("Stopped. What was done is kept; start the same conversion again to go on.", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _recipe(name: str | None, bits: int | None, group_size: int | None) -> Recipe | None:
    """Return the recipe that the options name; None leaves it to the registry."""
    from edger1.quant import recipes

    if name is not None and bits is not None:
        raise UsageError("--recipe and --bits were both given; expected one of them.")
    if group_size is not None and bits is None:
        raise UsageError("--group-size goes with --bits; a recipe has group sizes of its own.")
    if bits is not None:
        return recipes.uniform(bits, group_size)
    return recipes.find(name) if name is not None else None


def _against(wanted: Wanted) -> tuple[Path, str]:
    """Return what the result will be measured against, and the words that it will be measured on."""
    from edger1.fetch.quantize import source_of
    from edger1.quant.calibrate import documents

    found = documents(wanted.calibration.text if wanted.calibration is not None else None)
    texts = [one if isinstance(one, str) else "\n".join(turn["content"] for turn in one) for one in found]
    return source_of(wanted), "\n\n".join(texts)


def _measure(wanted: Wanted, source: Path, words: str, folder: Path, watch: Watch) -> None:
    """Measure the model in `folder` against `source`, and write and print the figures."""
    import json

    from edger1.measuring import report
    from edger1.quant.measure_report import table

    found = report(source, folder, words)
    (folder / "report.json").write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    for line in table(found):
        watch.note(line)
    if wanted.calibration is not None:
        watch.note("  Measured on the text that the codes were fitted to; on other texts a little more is lost.")
