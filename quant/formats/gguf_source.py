"""A GGUF model as a source of weights: every tensor under the name it has in the model's own checkpoint.

Where each tensor goes is worked out in `gguf_models`; stacked experts keep their stack, under the names that mlx-lm
gives it. The tokenizer, which lies in the metadata, is written into a temporary folder, because companions are files.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant import gguf_models, gguf_rope, tokenizer
from edger1.quant.formats import ggml
from edger1.quant.formats.gguf import TensorInfo
from edger1.quant.formats.gguf_parts import GGUFParts
from edger1.quant.gguf_outline import Placement
from edger1.quant.source import Codes, Coding, Tensor

NUMBERS_DTYPE = "F16"
"""What a quantized tensor counts as unquantized: its scales are f16, so that no number in it is beyond that."""


_KEPT = ("F32", "F16", "BF16")
"""What safetensors hold as it is."""


def open_gguf(path: Path, *, allow_nonfinite: bool = False) -> GGUFSource:
    """Open the GGUF file `path`, or the split model that it is a part of.

    `allow_nonfinite` lets NaN and infinities through; otherwise reading a tensor that holds one raises FormatError.
    Raises FormatError for a file that is damaged, incomplete, or of an architecture, a type or a tokenizer that cannot
    be converted.
    """
    return GGUFSource(path, allow_nonfinite)


def _check_finite(parts: GGUFParts, info: TensorInfo, numbers: np.ndarray) -> None:
    if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
        raise FormatError(
            f"{parts.path.name}: tensor {info.name!r} ({info.type.name}) holds NaN or infinities; the file is damaged, "
            "or the model is. Fetch it again or get another conversion of it."
        )


def _plain_dtype(kind: ggml.GGMLType) -> str:
    if kind.block_elements > 1:
        return NUMBERS_DTYPE
    return "F32" if kind.name == "F64" else kind.name


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a GGUF file; see `source.Tensor`."""

    parts: GGUFParts
    info: TensorInfo
    placement: Placement
    allow_nonfinite: bool = False

    @property
    def name(self) -> str:
        """The name in the model's checkpoint."""
        return self.placement.target

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape, rows first."""
        return (1, *self.info.shape) if self.placement.one_row else self.info.shape

    @property
    def dtype(self) -> str:
        """What the numbers are in unquantized."""
        return _plain_dtype(self.info.type)

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
        if self.kind not in ggml.CODE_BITS or len(self.info.shape) < 2 or self.placement.shift:
            return None
        if self.kind == "MXFP4":
            return Coding("mxfp4", 4, ggml.GROUP_SIZE, "U8", None)
        return Coding("affine", ggml.CODE_BITS[self.kind], ggml.GROUP_SIZE, "F16", "F16")

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32."""
        if len(self.info.shape) == 1:
            # Rows of one number may lie in one block.
            whole = ggml.dequantize(self.info.type, self.parts.read(self.info), self.info.shape)
            numbers = whole.reshape(self.shape)[start:stop]
        else:
            raw = self._raw_rows(start, stop)
            numbers = ggml.dequantize(self.info.type, raw, (stop - start, *self.shape[1:]))
        if not self.allow_nonfinite:
            _check_finite(self.parts, self.info, numbers)
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


@dataclass(frozen=True)
class JoinedTensor:
    """The projection out of DeepSeek-V2's latent, which GGUF keeps in two; see `Placement.values`."""

    parts: GGUFParts
    keys: TensorInfo
    values: TensorInfo
    name: str
    allow_nonfinite: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all heads, keys and values of each, over the latent's rank."""
        heads, rank, _ = self.keys.shape
        return (heads * self._head_rows, rank)

    @property
    def dtype(self) -> str:
        """What the numbers are in unquantized."""
        return _plain_dtype(self.keys.type)

    @property
    def kind(self) -> str:
        """The GGUF types of both, and that the tensor is none of the file's own."""
        return " and ".join(dict.fromkeys((self.keys.type.name, self.values.type.name))) + " joined"

    @property
    def nbytes(self) -> int:
        """What both take in the file."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def coding(self) -> Coding | None:
        """None: keys are transposed, so that their groups lie across the rows."""
        return None

    @property
    def _head_rows(self) -> int:
        return self.keys.shape[2] + self.values.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32."""
        first, last = start // self._head_rows, -(-stop // self._head_rows)
        keys, values = (
            ggml.dequantize(info.type, self.parts.read(info, first, last), (last - first, *info.shape[1:]))
            for info in (self.keys, self.values)
        )
        if not self.allow_nonfinite:
            _check_finite(self.parts, self.keys, keys)
            _check_finite(self.parts, self.values, values)
        rows = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, self.shape[1])
        return rows[start - first * self._head_rows : stop - first * self._head_rows]

    def codes(self, start: int, stop: int) -> Codes:
        """Never asked for, because `coding` is None."""
        raise AssertionError(f"{self.name} has no codes")


class GGUFSource:
    """An open GGUF model; see `source.Source`."""

    def __init__(self, path: Path, allow_nonfinite: bool = False):
        self._allow_nonfinite = allow_nonfinite
        self._parts = GGUFParts(path)
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        try:
            header = self._parts.header
            plan = gguf_models.plan(header, gguf_rope.read_factors(self._parts))
            for info in header.tensors.values():
                if not ggml.has_numbers(info.type):
                    raise FormatError(
                        f"{header.name}: tensor {info.name!r} has the type {info.type.name}, which holds no weights "
                        "that can be read; get the model in another type."
                    )
            self._tokenizer = tokenizer.build(header, plan.config["vocab_size"])
            self._config = {**plan.config, **self._tokenizer.token_ids()}
            self._tensors = {placement.target: self._tensor(placement) for placement in plan.placements}
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
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor, in the order of the layers."""
        return self._tensors

    def requantized(self) -> Counter[str]:
        """Count the tensors, by their type in the file, that no format of MLX holds as they are."""
        return Counter(
            tensor.kind for tensor in self._tensors.values() if tensor.coding is None and tensor.kind not in _KEPT
        )

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

    def _tensor(self, placement: Placement) -> Tensor:
        infos = [self._parts.header.tensors[name] for name in placement.sources]
        if len(infos) > 1:
            return JoinedTensor(self._parts, infos[0], infos[1], placement.target, self._allow_nonfinite)
        return GGUFTensor(self._parts, infos[0], placement, self._allow_nonfinite)

    def close(self) -> None:
        """Close the files and remove the companions."""
        self._parts.close()
        if self._folder is not None:
            self._folder.cleanup()
