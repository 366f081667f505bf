"""What the converter can read, run layer by layer: `quant.layers.LayerSource` over a `quant.source.Source`.

So a GGUF file, or a checkpoint in a format that mlx-lm does not load, is measured as it is, without being converted:
what mlx-lm's model is made of comes out of the source's tensors a few rows at a time (`quant.tracing`).
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.folder import inspect
from edger1.layer_modules import kinds
from edger1.layers import ModelLayers, open_layers
from edger1.mlx_runtime import prepare
from edger1.quant.source import Source, Tensor


class SourceMatrices:
    """The matrices of a model as a source has them; `tensors` are the model's arrays by name."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shape(self, path: str, module: Any) -> tuple[int, ...]:
        """See `edger1.layer_matrices.Matrices`."""
        return self._tensors[f"{path}.weight"].shape

    def rows(self, path: str, module: Any, expert: int | None, start: int, stop: int) -> np.ndarray:
        """See `edger1.layer_matrices.Matrices`."""
        tensor = self._tensors[f"{path}.weight"]
        found = tensor.read(start, stop) if expert is None else tensor.read(expert, expert + 1)[0, start:stop]
        return found.astype(np.float32, copy=False)


class SourceLayers(ModelLayers):
    """A source, one decoder layer at a time. Closing it closes the source."""

    def __init__(self, source: Source) -> None:
        from edger1.quant.architecture import build
        from edger1.quant.tracing import trace

        traced = trace(source.config, source.tensors)
        model = build(source.config)
        _fill(model, traced.tensors, source.name)
        companions = source.companions
        if not companions:
            raise FormatError(f"{source.name} has no tokenizer beside it, so it cannot be given a text.")
        super().__init__(source.name, model, source.config, SourceMatrices(traced.tensors), companions[0].parent)
        self._source = source
        self.tokenizer_folder = companions[0].parent
        # Of what the model has; layers for multi-token prediction, say, are left out.
        used = {name for tensor in traced.tensors.values() for name in tensor.sources}
        self.weight_bytes = sum(source.tensors[name].nbytes for name in used)
        self.parameters = sum(math.prod(tensor.shape) for tensor in traced.tensors.values())

    def close(self) -> None:
        """Drop the model and close the source."""
        super().close()
        self._source.close()


def open_any(path: Path) -> ModelLayers:
    """Open a model folder, a checkpoint in any format that can be converted, or a GGUF file, to be run layer by layer.

    Raises FormatError and UnknownModelError as opening it for conversion or loading it would.
    """
    if _loads(path):
        return open_layers(path)
    prepare()
    from edger1.quant.opening import open_source

    source = open_source(path)
    try:
        return SourceLayers(source)
    except BaseException:
        source.close()
        raise


def size(path: Path, opened: ModelLayers) -> tuple[int, float]:
    """Return the bytes of weights of what was opened, and bits a weight."""
    if isinstance(opened, SourceLayers):
        nbytes, parameters = opened.weight_bytes, opened.parameters
    else:
        folder = inspect(path)
        nbytes, parameters = folder.total_bytes, folder.parameters
    return nbytes, 8 * nbytes / max(1, parameters)


def _loads(path: Path) -> bool:
    """Whether mlx-lm loads it: a folder that no other program has quantized."""
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        # Of a folder, the sentence about what is wrong with it comes from where models are opened.
        return path.is_dir() and not any(path.glob("*.gguf"))
    if not isinstance(config, dict):
        return True
    nested = config.get("text_config")
    settings = [table.get("quantization_config") for table in (config, nested) if isinstance(table, dict)]
    return not any(isinstance(each, dict) and "quant_method" in each for each in settings)


def _fill(model: Any, tensors: Mapping[str, Tensor], name: str) -> None:
    """Give a model that was just made everything but its matrices."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    model.eval()
    if any(key not in tensors for key, _ in tree_flatten(model.parameters())) and hasattr(model, "sanitize"):
        # Families find out here that a head is not there, and take the embedding instead.
        with contextlib.suppress(Exception):
            model.sanitize({})
    by_rows = {f"{path}.weight" for path, module in model.named_modules() if type(module) in kinds()}
    given = []
    for key, value in tree_flatten(model.parameters()):
        if key not in tensors:
            raise FormatError(f"{name} has nothing for {key}, which the model needs; fetch it again.")
        if key in by_rows:
            # Never computed with: it only has the matrix's form.
            given.append((key, mx.zeros(value.shape, dtype=mx.float32)))
            continue
        tensor = tensors[key]
        whole = tensor.read(0, tensor.shape[0] if tensor.shape else 1).reshape(tensor.shape)
        given.append((key, mx.array(whole)))
    model.update(tree_unflatten(given))
