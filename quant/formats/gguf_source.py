"""A GGUF model as a source of weights: every tensor under the name it has in the model's own checkpoint.

Where each tensor goes is worked out in `gguf_models`; stacked experts keep their stack, under the names that mlx-lm
gives it. The tokenizer, which lies in the metadata, is written into a temporary folder, because companions are files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant import gguf_models, tokenizer
from edger1.quant.formats import ggml
from edger1.quant.formats.gguf import TensorInfo
from edger1.quant.formats.gguf_parts import GGUFParts
from edger1.quant.source import Codes, Coding

NUMBERS_DTYPE = "F16"
"""What a quantized tensor counts as unquantized: its scales are f16, so that no number in it is beyond that."""


def open_gguf(path: Path) -> GGUFSource:
    """Open the GGUF file `path`, or the split model that it is a part of.

    Raises FormatError for a file that is damaged, incomplete, or of an architecture, a type or a tokenizer that cannot
    be converted.
    """
    return GGUFSource(path)


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file; see `source.Tensor`."""

    parts: GGUFParts
    info: TensorInfo
    placement: gguf_models.Placement

    @property
    def name(self) -> str:
        """The name in the model's checkpoint."""
        return self.placement.target

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, rows first."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """What the numbers are in unquantized."""
        if self.info.type.block_elements > 1:
            return NUMBERS_DTYPE
        return "F32" if self.kind == "F64" else self.kind

    @property
    def kind(self) -> str:
        """The GGUF type."""
        return self.info.type.name

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return self.info.nbytes

    @property
    def coding(self) -> Coding | None:
        """MLX's format for its codes, for the types that coincide with one."""
        if self.kind not in ggml.CODE_BITS or len(self.shape) < 2 or self.placement.shift:
            return None
        if self.kind == "MXFP4":
            return Coding("mxfp4", 4, ggml.GROUP_SIZE, "U8", None)
        return Coding("affine", ggml.CODE_BITS[self.kind], ggml.GROUP_SIZE, "F16", "F16")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32."""
        if len(self.shape) == 1:
            numbers = ggml.dequantize(self.info.type, self.parts.read(self.info), self.shape)[start:stop]
        else:
            raw = self._raw_rows(start, stop)
            numbers = ggml.dequantize(self.info.type, raw, (stop - start, *self.shape[1:]))
        # llama.cpp adds to f32, so that the f32 difference is the number it began with.
        return numbers + np.float32(self.placement.shift) if self.placement.shift else numbers

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop) as MLX holds them."""
        raw = self._raw_rows(start, stop)
        carried = ggml.carry(self.info.name, self.info.type, raw, (stop - start, *self.shape[1:]))
        biases = carried.parts.get("biases")
        if biases is not None and biases.dtype != "F16":
            raise FormatError(
                f"{self.parts.path.name}: tensor {self.info.name!r} ({self.kind}) has scales so large that its offsets "
                "do not fit in float16; its codes cannot be kept. Convert it with a recipe that gives it other bits."
            )
        return Codes(carried.parts["weight"], carried.parts["scales"], biases)

    def _raw_rows(self, start: int, stop: int) -> np.ndarray:
        if self.placement.heads is None:
            return self.parts.read(self.info, start, stop)
        rows = gguf_models.restored_rows(self.shape[0], self.placement.heads)[start:stop]
        if not len(rows):
            return np.empty(0, np.uint8)
        first, last = int(rows.min()), int(rows.max())
        raw = self.parts.read(self.info, first, last + 1).reshape(last + 1 - first, -1)
        return raw[rows - first].reshape(-1)


class GGUFSource:
    """An open GGUF model; see `source.Source`."""

    def __init__(self, path: Path):
        self._parts = GGUFParts(path)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            header = self._parts.header
            plan = gguf_models.plan(header, gguf_models.read_rope_factors(self._parts))
            for info in header.tensors.values():
                if not ggml.has_numbers(info.type):
                    raise FormatError(
                        f"{header.name}: tensor {info.name!r} has the type {info.type.name}, which holds no weights "
                        "that can be read; get the model in another type."
                    )
            self._tokenizer = tokenizer.build(header, plan.config["vocab_size"])
            self._config = {**plan.config, **self._tokenizer.token_ids()}
            self._tensors = {
                placement.target: GGUFTensor(self._parts, header.tensors[placement.source], placement)
                for placement in plan.placements
            }
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The name of the file without its suffix and the number of a part."""
        return self._parts.name

    @property
    def config(self) -> dict[str, Any]:
        """config.json as mlx-lm reads it, made from the metadata."""
        return self._config

    @property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """Every tensor, in the order of the layers."""
        return self._tensors

    @cached_property
    def companions(self) -> tuple[Path, ...]:
        """The tokenizer's files and generation_config.json; they are gone when the source is closed."""
        self._folder = tempfile.TemporaryDirectory(prefix="edger1-gguf-")
        folder = Path(self._folder.name)
        self._tokenizer.write(folder)
        return tuple(sorted(folder.iterdir()))

    @property
    def fingerprint(self) -> str:
        """A checksum over the names, sizes and times of the files."""
        return self._parts.fingerprint

    def close(self) -> None:
        """Close the files and remove the companions."""
        self._parts.close()
        if self._folder is not None:
            self._folder.cleanup()
