"""What a source of weights is to the converter: named tensors, any rows of which can be had without the rest.

A reader of a format (`quant/formats`) gives each tensor under the name that the model's checkpoint has for it
unquantized ("model.layers.0.mlp.gate_proj.weight"), whatever the file keeps in its place (`.qweight`,
`.weight_scale_inv`, `blk.0.ffn_gate.weight`). Rows are counted along the first axis, so that of a stack
[experts, n, k] a row is an expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edger1.quant.formats.ggml import Array


@dataclass(frozen=True)
class Coding:
    """How MLX could hold a tensor's codes as they are, without loss.

    `mode` is MLX's ("affine", "mxfp4", "nvfp4", "mxfp8"); `scales` and `biases` are safetensors' dtypes of those,
    and `biases` is None in the modes that have none.
    """

    mode: str
    bits: int
    group_size: int
    scales: str
    biases: str | None


@dataclass(frozen=True)
class Codes:
    """Rows of a tensor [..., n, k] as MLX holds them.

    `weight` is U32 [..., n, k * bits / 32], the others are [..., n, k / group_size].
    """

    weight: Array
    scales: Array
    biases: Array | None


class Tensor(Protocol):
    """One tensor of a source. Nothing of its data is in memory until it is read.

    `shape` is the logical one, of numbers. `dtype` is what the unquantized checkpoint would hold ("BF16", "F16", "F32",
    or an integer's name for what is no weight). `kind` names how it is stored, for reports ("BF16", "F8_E4M3 128x128",
    "Q4_K", "GPTQ 4"). `nbytes` is what reading all of it takes from the disk. `coding` is set where its codes can be
    carried over.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtype(self) -> str: ...  # noqa: D102
    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    @property
    def coding(self) -> Coding | None: ...  # noqa: D102

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32 (integers as they are), shape [stop - start, *shape[1:]].

        Raises FormatError where the file no longer holds what its header said.
        """
        ...

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop); only where `coding` is set."""
        ...


class Source(Protocol):
    """An opened model to convert; the files are only ever read.

    `config` is config.json as mlx-lm reads it, without the source's own quantization. `companions` are the small files
    that go along (tokenizer, chat template, generation config). `fingerprint` changes when any weight file does.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def config(self) -> dict[str, Any]: ...  # noqa: D102
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def companions(self) -> tuple[Path, ...]: ...  # noqa: D102
    @property
    def fingerprint(self) -> str: ...  # noqa: D102

    def close(self) -> None:
        """Close the files."""
        ...
