"""What a GGUF model of some family must hold: the sizes in its metadata, and a place and a shape for every tensor.

A family (`gguf_families`) fills an `Outline`; `gguf_models.plan` then holds the file against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.gguf import Header


@dataclass(frozen=True)
class Placement:
    """Tensor `source` of the file becomes `target`.

    `heads` is the number of heads whose rows are to be put back in order, `shift` is to be added to each number,
    `one_row` makes a vector a matrix of one row. Where `values` is set, the target is a matrix [heads * (n + m), rank]
    that has by turns the rows of a head of `source` (keys, [heads, rank, n], transposed) and of `values`
    ([heads, m, rank]).
    """

    source: str
    target: str
    heads: int | None = None
    shift: float = 0.0
    one_row: bool = False
    values: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the tensors that it takes."""
        return (self.source,) if self.values is None else (self.source, self.values)


@dataclass(frozen=True)
class Expected:
    """A tensor that the file must have, and its shape there."""

    source: str
    shape: tuple[int, ...]


class Outline:
    """The sizes of a model, and what has been said of its tensors and its config.json so far.

    Raises FormatError where the metadata lack a size or give one that is impossible.
    """

    def __init__(self, header: Header):
        self.header = header
        self.name = header.text("general.architecture")
        embedding = header.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise FormatError(f"{header.name} has no matrix 'token_embd.weight'; it is no whole language model.")
        self.vocabulary = embedding.shape[0]
        self.hidden = self.count("embedding_length")
        self.blocks = self.count("block_count")
        self.extra_blocks = header.integer(self.key("nextn_predict_layers"), 0)
        self.heads = self.count("attention.head_count")
        self.kv_heads = self.count("attention.head_count_kv", self.heads)
        self.head_dim = self.count("attention.key_length", max(1, self.hidden // self.heads))
        self.placements: list[Placement] = []
        self.expected: list[Expected] = []
        self.config: dict[str, Any] = {}
        self._check()

    @property
    def layers(self) -> int:
        """Decoder layers, without those that only predict further tokens (MTP)."""
        return self.blocks - self.extra_blocks

    @property
    def wide(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head_dim

    @property
    def narrow(self) -> int:
        """Rows of the key projection."""
        return self.kv_heads * self.head_dim

    def key(self, name: str) -> str:
        """Return a metadata key of this architecture."""
        return f"{self.name}.{name}"

    def count(self, name: str, default: int | None = None) -> int:
        """Return a positive number; a list of equal ones, one a layer, counts as that one."""
        value = self.header.metadata.get(self.key(name))
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and len(set(value.tolist())) == 1:
            found = int(value[0])
        else:
            found = self.header.integer(self.key(name), default)
        if not 0 < found < 1 << 31:
            raise FormatError(
                f"{self.header.name}: metadata {self.key(name)!r} is {found:,}; expected a positive number below 2^31."
            )
        return found

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive number as the shortest decimal that names the same f32, which is what GGUF keeps."""
        return self.any_number(name, default, positive=True)

    def any_number(self, name: str, default: float | None = None, *, positive: bool = False) -> float:
        """Return a finite number, likewise; one below zero too unless it must be `positive`."""
        value = self.header.number(self.key(name), default)
        if not math.isfinite(value) or (positive and value <= 0):
            raise FormatError(
                f"{self.header.name}: metadata {self.key(name)!r} is {value}; expected a positive number."
                if positive
                else f"{self.header.name}: metadata {self.key(name)!r} is {value}; expected a finite number."
            )
        # 1e-05 arrives as 9.999999747378752e-06.
        return float(str(np.float32(value))) if float(np.float32(value)) == value else value

    def has(self, source: str) -> bool:
        """Say whether the file holds the tensor `source`."""
        return source in self.header.tensors

    def refuse(self, what: str) -> FormatError:
        """Return the error for a variant that cannot be converted."""
        return FormatError(
            f"{self.header.name} is a {self.name} model with {what}, which cannot be converted. "
            "Get it as an MLX folder instead."
        )

    def add(
        self, source: str, target: str, *shape: int, heads: int | None = None, shift: float = 0.0, one_row: bool = False
    ) -> None:
        """Say that tensor `source`, of `shape` in the file, becomes `target`."""
        self.expected.append(Expected(source, shape))
        self.placements.append(Placement(source, target, heads, shift, one_row))

    def add_joined(self, keys: str, values: str, target: str, heads: int, key_rows: int, rows: int, rank: int) -> None:
        """Say that two projections out of one latent become one matrix; see `Placement.values`."""
        self.expected += [Expected(keys, (heads, rank, key_rows)), Expected(values, (heads, rows, rank))]
        self.placements.append(Placement(keys, target, values=values))

    def linear(
        self, source: str, target: str, rows: int, columns: int, bias: bool = False, heads: int | None = None
    ) -> None:
        """Say that `source`.weight, and `source`.bias where there is one, become those of `target`."""
        self.add(f"{source}.weight", f"{target}.weight", rows, columns, heads=heads)
        if bias:
            self.add(f"{source}.bias", f"{target}.bias", rows, heads=heads)

    def each_layer(self, describe: Callable[[Outline, str, str], None]) -> None:
        """Call `describe(outline, "blk.<i>", "model.layers.<i>")` for every decoder layer."""
        for layer in range(self.layers):
            describe(self, f"blk.{layer}", f"model.layers.{layer}")

    def _check(self) -> None:
        if self.blocks > len(self.header.tensors):
            raise FormatError(
                f"{self.header.name} claims {self.blocks:,} layers but holds {len(self.header.tensors)} tensors; it is "
                "damaged."
            )
        if not 0 <= self.extra_blocks < self.blocks:
            raise FormatError(
                f"{self.header.name} claims {self.blocks} layers, {self.extra_blocks:,} of them for predicting further "
                "tokens; it is damaged."
            )
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise FormatError(
                f"{self.header.name} claims {self.heads} heads over {self.kv_heads} key/value heads of {self.head_dim} "
                "elements; heads must divide evenly and be of even size."
            )
