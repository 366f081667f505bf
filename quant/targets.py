"""The arrays of mlx-lm's model as tensors: expressions over a source's tensors, read and carried as those are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from edger1.errors import FormatError
from edger1.quant.expressions import Arrays, Expression, Leaf, to_mlx, to_numpy
from edger1.quant.formats.ggml import Array
from edger1.quant.quantizing import thread_stream
from edger1.quant.source import Codes, Coding

_FLOAT_DATA = {"F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, eq=False)
class _Target:
    """`name` is the array's in mlx-lm's model, `casts` whether mlx-lm gives it the dtype that a model is saved in."""

    name: str


@dataclass(frozen=True, eq=False)
class Plain(_Target):
    """An array that is what one expression gives: a `Tensor` of a source (quant/source.py)."""

    expression: Expression
    casts: bool = True

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's."""
        return self.expression.shape

    @property
    def dtype(self) -> str:
        """What mlx-lm would have it in, of this source."""
        return self.expression.dtype

    @cached_property
    def _leaves(self) -> tuple[Leaf, ...]:
        return self.expression.leaves()

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The source's tensors that it depends on."""
        return tuple(leaf.name for leaf in self._leaves)

    @cached_property
    def kind(self) -> str:
        """How those are stored, the first kinds of them."""
        return _kinds(self._leaves)

    @cached_property
    def nbytes(self) -> int:
        """What reading all of them takes from the disk. Parts of one tensor count it each."""
        return sum(leaf.tensor.nbytes for leaf in self._leaves)

    @cached_property
    def coding(self) -> Coding | None:
        """How the codes of the source's tensors make up this one's; None where they do not, or where there are none."""
        codings = {leaf.tensor.coding for leaf in self._leaves}
        if not codings or len(self.shape) < 2 or not self.expression.carries():
            return None
        first = next(iter(codings))
        if first is None or None in codings:
            return None
        others = [coding for coding in codings if coding is not None]
        # Scales of several dtypes go together in f32, which holds them all.
        wide = len({(coding.scales, coding.biases) for coding in others}) > 1
        if wide and any(coding.scales not in ("F16", "BF16", "F32") for coding in others):
            return None
        same = {replace(coding, scales="F32", biases=coding.biases and "F32") if wide else coding for coding in others}
        return same.pop() if len(same) == 1 else None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32 (integers as they are), in memory that is a small multiple of them.

        Any thread may read.
        """
        import mlx.core as mx

        with mx.stream(thread_stream()):
            return np.asarray(self.expression.rows(start, stop, _numbers)[0], order="C")

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop); only where `coding` is set."""
        coding = self.coding
        if coding is None:
            raise FormatError(f"{self.name!r} ({self.kind}) has no codes that MLX could hold.")

        def read(leaf: Leaf, start: int, stop: int) -> Arrays:
            codes = leaf.tensor.codes(start, stop)
            arrays = (codes.weight.data, _as(codes.scales, coding.scales))
            return arrays if codes.biases is None else (*arrays, _as(codes.biases, coding.biases))

        weight, scales, *biases = (np.ascontiguousarray(a) for a in self.expression.rows(start, stop, read))
        return Codes(
            Array("U32", weight),
            Array(coding.scales, scales),
            Array(coding.biases, biases[0]) if biases and coding.biases else None,
        )


@dataclass(frozen=True, eq=False)
class Packed(_Target):
    """A weight that `sanitize` leaves quantized as the source has it, in MLX's layout: one tensor of numbers here."""

    shape: tuple[int, ...]
    dtype: str
    coding: Coding
    weight: Plain
    scales: Plain
    biases: Plain | None
    casts: bool = True

    @staticmethod
    def of(
        name: str, shape: tuple[int, ...], weight: Expression, scales: Expression, biases: Expression | None
    ) -> Packed:
        """Return the tensor of `shape` that the arrays hold; mode and bits follow from their shapes, as for mlx-lm.

        Raises FormatError where MLX has no such mode.
        """
        columns = shape[-1]
        bits, group = weight.shape[-1] * 32 // columns, columns // max(1, scales.shape[-1])
        mode = {(4, 32): "mxfp4", (4, 16): "nvfp4", (8, 32): "mxfp8"}.get((bits, group))
        if scales.dtype != "U8":
            mode = "affine"
        whole = weight.dtype == "U32" and bits * columns == weight.shape[-1] * 32 and (mode == "affine") == bool(biases)
        if mode is None or not whole or not weight.shape[:-1] == scales.shape[:-1] == shape[:-1]:
            raise FormatError(
                f"{name!r} holds codes of shape {list(weight.shape)} ({weight.dtype}) with scales of shape "
                f"{list(scales.shape)} ({scales.dtype}); MLX has no mode in which they make {list(shape)} numbers."
            )
        coding = Coding(mode, bits, group, scales.dtype, biases.dtype if biases else None)
        path = name.rpartition(".")[0]
        return Packed(
            name,
            shape,
            scales.dtype if mode == "affine" else "BF16",
            coding,
            Plain(name, weight),
            Plain(f"{path}.scales", scales),
            Plain(f"{path}.biases", biases) if biases else None,
        )

    @property
    def _parts(self) -> tuple[Plain, ...]:
        return (self.weight, self.scales, self.biases) if self.biases else (self.weight, self.scales)

    @property
    def sources(self) -> tuple[str, ...]:
        """The source's tensors that it depends on."""
        return tuple(dict.fromkeys(name for part in self._parts for name in part.sources))

    @property
    def kind(self) -> str:
        """MLX's mode and bits."""
        return f"{self.coding.mode} {self.coding.bits}"

    @property
    def nbytes(self) -> int:
        """What reading all of them takes from the disk. Parts of one tensor count it each."""
        return sum(part.nbytes for part in self._parts)

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        found = [Array(part.dtype, _stored(part.read(start, stop), part.dtype)) for part in self._parts]
        return Codes(found[0], found[1], found[2] if self.biases else None)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32."""
        import mlx.core as mx

        coding, parts = self.coding, [part.read(start, stop) for part in self._parts]
        with mx.stream(thread_stream()):
            weight, scales, *biases = (to_mlx(rows, part.dtype) for rows, part in zip(parts, self._parts, strict=True))
            if biases:
                scales, biases = scales.astype(mx.float32), [biases[0].astype(mx.float32)]
            numbers = mx.dequantize(
                weight,
                scales,
                biases[0] if biases else None,
                group_size=coding.group_size,
                bits=coding.bits,
                mode=coding.mode,
                dtype=mx.float32,
            )
            return to_numpy(numbers)


Target = Plain | Packed


def _kinds(leaves: tuple[Leaf, ...]) -> str:
    kinds = list(dict.fromkeys(leaf.tensor.kind for leaf in leaves))
    return ", ".join(kinds[:3]) + (", ..." if len(kinds) > 3 else "")


def _numbers(leaf: Leaf, start: int, stop: int) -> Arrays:
    tensor = leaf.tensor
    numbers = tensor.read(start, stop)
    return (numbers.reshape(tensor.shape and (stop - start, *tensor.shape[1:])),)


def _stored(numbers: np.ndarray, dtype: str) -> np.ndarray:
    """Return numbers as safetensors stores them; they are known to be representable."""
    if dtype == "BF16":
        return (np.ascontiguousarray(numbers, np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return numbers.astype(_FLOAT_DATA[dtype]) if dtype in _FLOAT_DATA else numbers


def _as(array: Array, dtype: str | None) -> np.ndarray:
    """Return scales as `dtype`, which is their own, or F32."""
    if array.dtype == dtype or dtype is None:
        return array.data
    if array.dtype == "BF16":
        return (array.data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.data.astype(np.float32)
