"""Turning a fetched GGUF file into a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from edger1.fetch.steps import Step, Watch

if TYPE_CHECKING:
    from edger1.quant.source import Source


def convert(source: Path, destination: Path, watch: Watch) -> Path:
    """Convert the GGUF file `source` into the folder `destination` and return it.

    No number changes where MLX can hold all types in it. Otherwise those that it cannot are quantized again, with a bit
    more than they have, and `watch` is told. What is there already is replaced when the new folder is whole, and kept
    where the conversion fails. Raises FormatError for a file that is damaged or cannot be converted.
    """
    from edger1.quant.convert import convert_gguf
    from edger1.quant.formats import ggml
    from edger1.quant.opening import open_source

    fresh = destination.with_name(f"{destination.name}.new")
    # From a pull that was killed between the two renames.
    shutil.rmtree(fresh, ignore_errors=True)
    opened = open_source(source, allow_nonfinite=True)
    try:
        foreign = sorted({tensor.kind for tensor in opened.tensors.values()} - ggml.CARRIERS.keys())
        if foreign:
            _requantize(opened, fresh, foreign, watch)
    finally:
        opened.close()
    if not foreign:
        convert_gguf(source, fresh, lambda done, total: watch.progress(Step("convert", done, total)))
    shutil.rmtree(destination, ignore_errors=True)
    return fresh.rename(destination)


def _requantize(source: Source, destination: Path, kinds: list[str], watch: Watch) -> None:
    from edger1.fetch.quantize import convert_source
    from edger1.quant.converting import Settings
    from edger1.quant.recipes import near

    watch.note(
        f"{source.name} has weights of {', '.join(kinds)}, which MLX has no like of: they are quantized again with a "
        "bit more than they have. The rest is carried over without loss."
    )
    found = {name.removesuffix(".weight"): tensor.kind for name, tensor in source.tensors.items()}
    # Whoever pulls has no way to say that what was left of another version of the file may go.
    convert_source(source, destination, near(found), watch, Settings(renew=True))
