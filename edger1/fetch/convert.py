"""Turning a fetched GGUF file into a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from edger1.fetch.steps import Step, Watch


def convert(source: Path, destination: Path, watch: Watch) -> Path:
    """Convert the GGUF file `source` into the folder `destination` and return it.

    What is there already is replaced when the new folder is whole, and kept where the conversion fails. Raises
    FormatError for a file that is damaged or of a type that cannot be carried over.
    """
    from edger1.quant.convert import convert_gguf

    fresh = destination.with_name(f"{destination.name}.new")
    # From a pull that was killed between the two renames.
    shutil.rmtree(fresh, ignore_errors=True)
    convert_gguf(source, fresh, lambda done, total: watch.progress(Step("convert", done, total)))
    shutil.rmtree(destination, ignore_errors=True)
    return fresh.rename(destination)
