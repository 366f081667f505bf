"""Turning a fetched GGUF file into a model folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from edger1.fetch.steps import Step, Watch


def convert(source: Path, destination: Path, watch: Watch) -> Path:
    """Convert the GGUF file `source` into the new folder `destination` and return it.

    What a killed conversion left there is removed first. Raises FormatError for a file that is damaged or of a type
    that cannot be carried over.
    """
    from edger1.quant.convert import convert_gguf

    shutil.rmtree(destination, ignore_errors=True)
    convert_gguf(source, destination, lambda done, total: watch.progress(Step("convert", done, total)))
    return destination
