"""What `edger1 convert --calibrate` and `--fit` do before a conversion: run the source's layers over a text.

The source is run layer by layer, so that it need not fit into memory. Statistics lie in a folder beside the
conversion's, where an interrupted one finds them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edger1 import worker
from edger1.errors import FormatError, UsageError
from edger1.fetch.place import write_atomically
from edger1.kv_layout import kv_layout
from edger1.layers import ModelLayers
from edger1.memory import DEFAULT_CONTEXT, make_plan
from edger1.mlx_runtime import on_gpu
from edger1.planning import prefill_step
from edger1.quant import calibrate, fit, recipes
from edger1.quant.calibrate import Statistics
from edger1.quant.formats.gguf_names import part_paths
from edger1.quant.recipes import Recipe
from edger1.source_layers import open_any
from edger1.units import format_bytes

WINDOWS = 64
"""Windows of text that are calibrated on, at most."""
PROBED_WINDOWS = 8
PROBED_BYTES = 1 << 30
"""Hidden states that probing may hold, one for each linear; in models for which that is little, fewer tokens go in."""
DISTRIBUTIONS = 5
"""Times that f32 numbers over the whole vocabulary are held for each token: both models' and what compares them."""
LEAST_PROBED = 32
"""Tokens that a window is cut to before there are fewer windows."""
RECIPE = "fitted.json"
SOURCE = "source"
"""The file that says of which state of the source the statistics are."""

Progress = Callable[[str, int, int], None]
"""Hears of a stage ("calibrate", "fit"), and how much of it is done."""


@dataclass(frozen=True)
class Prepared:
    """What goes into the conversion: statistics to fit codes with, and the recipe where one was fitted to a size."""

    statistics: Statistics
    recipe: Recipe | None

    @property
    def digest(self) -> str:
        """Names the statistics, for the record and so that another calibration is not gone on with."""
        return f"{self.statistics.tokens} tokens, {self.statistics.digest}"


def prepare(
    source: Path, work: Path, text: Path | None, ceiling_bytes: int | None, on_progress: Progress = lambda *_: None
) -> Prepared:
    """Calibrate on the text file or data set `text`, None for the one that comes along, with statistics in `work`.

    With a ceiling the bits of each linear are chosen so that the model and a context of 8,192 tokens fit under it. What
    an earlier call left in `work` for the same text and model is used. Raises UsageError for a text that cannot be
    used and a ceiling that is too low, FormatError for a damaged source.
    """
    documents = calibrate.documents(text)

    def run() -> Prepared:
        with contextlib.closing(open_any(source)) as layers:
            tokens = calibrate.windows(layers, documents, WINDOWS)
            statistics = _statistics(layers, tokens, work / "calibration", _state_of(source), on_progress)
            recipe = None if ceiling_bytes is None else _fitted(layers, tokens, statistics, ceiling_bytes, on_progress)
            return Prepared(statistics, recipe)

    return worker.call(run)


def _statistics(layers: ModelLayers, tokens: Any, folder: Path, state: str, on_progress: Progress) -> Statistics:
    expected = calibrate.digest_of(layers, tokens)
    # Text and name say nothing of the weights, which may have been others when this was made.
    made_of = folder / SOURCE
    with contextlib.suppress(FormatError, OSError, UnicodeDecodeError):
        found = calibrate.load(folder)
        if found.digest == expected and made_of.read_text(encoding="utf-8") == state:
            return found
    shutil.rmtree(folder, ignore_errors=True)
    found = calibrate.calibrate(
        layers, tokens, folder, on_progress=lambda done, total: on_progress("calibrate", done, total)
    )
    made_of.write_text(state, encoding="utf-8")
    return found


def _state_of(source: Path) -> str:
    """Return a checksum over where a source lies and the names, sizes and times of its files."""
    files = part_paths(source) if source.is_file() else (path for path in source.iterdir() if path.is_file())
    digest = hashlib.sha256(f"{source.resolve()}\n".encode())
    for path in sorted(files):
        about = path.stat()
        digest.update(f"{path.name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _fitted(
    layers: ModelLayers, tokens: Any, statistics: Statistics, ceiling_bytes: int, on_progress: Progress
) -> Recipe:
    """Return the recipe with the least predicted loss under the ceiling; kept in the statistics' folder."""
    every = (*range(layers.layers), None)
    shapes = {path: shape for layer in every for path, shape in layers.linears(layer).items()}
    shapes = {path: shape for path, shape in shapes.items() if shape[-1] % min(fit.GROUPS) == 0}
    beside = _beside(layers, shapes)
    budget = ceiling_bytes - beside
    # Said before the work rather than after it: no weight takes less than 2 bits.
    if budget * 8 < 2 * sum(math.prod(shape) for shape in shapes.values()):
        raise UsageError(
            f"{layers.name} takes {format_bytes(beside, up=True)} beside its weights with a context of "
            f"{DEFAULT_CONTEXT:,} tokens, which leaves too little of {format_bytes(ceiling_bytes)} for weights even at "
            "2 bits. Give more memory, or choose a smaller model."
        )
    kept = statistics.folder / f"{budget}-{RECIPE}"
    if kept.is_file():
        return recipes.read(kept)
    probed = _probed(layers, tokens, len(shapes), max(shape[-2] for shape in shapes.values()))
    losses = fit.sensitivities(
        layers, probed, list(shapes), on_progress=lambda done, total: on_progress("fit", done, total)
    )
    # As they will lie in memory: CPUs widen the scales.
    dtype = "BF16" if on_gpu() else "F32"
    ways = {
        path: fit.options(layers, path, shape, losses[path], statistics, dtype=dtype) for path, shape in shapes.items()
    }
    mix = fit.choose(ways, budget)
    table = mix.recipe("fitted")
    write_atomically(kept, json.dumps(table) + "\n")
    return recipes.from_json(table, "the fitted mix")


def _probed(layers: ModelLayers, tokens: np.ndarray, linears: int, vocabulary: int) -> np.ndarray:
    """Return those of [windows, length] tokens that sensitivities are measured on, as many as memory is for.

    That of their hidden states, one for each of `linears`, and of their distributions over the `vocabulary`.
    """
    found = tokens[:: max(1, len(tokens) // PROBED_WINDOWS)][:PROBED_WINDOWS]
    state_bytes = layers.begin(found[:1]).hidden.nbytes // found.shape[1]
    distribution_bytes = 4 * vocabulary * DISTRIBUTIONS
    most = max(2, min(PROBED_BYTES // (state_bytes * (linears + 1)), PROBED_BYTES // distribution_bytes))
    if most >= found.size:
        return found
    length = min(found.shape[1], most, max(LEAST_PROBED, most // len(found)))
    return found[: max(1, most // length), :length]


def _beside(layers: ModelLayers, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return what the model takes beside its linears: cache, activations, the process, norms and the like."""
    from mlx.utils import tree_flatten

    weights = {f"{path}.weight" for path in shapes}
    others = sum(array.size for name, array in tree_flatten(layers.model.parameters()) if name not in weights)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    each = 2 if on_gpu() else 4
    plan = make_plan(
        layers.config,
        each * others,
        kv_layout(layers.model, each, prefill_step(parameters)),
        context=DEFAULT_CONTEXT,
        ceiling_bytes=0,
        fused_attention=True,
    )
    return plan.total_bytes
