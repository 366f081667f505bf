"""Arrays made of a source's tensors, any rows of which can be had without computing the rest.

An expression is what mlx-lm's `Model.sanitize` does to tensors of a checkpoint until one array of the model is there:
a tree of stacks, slices, transposes and now and then a number added, with tensors at its leaves. Asked for rows of its
first axis, a node asks its inputs for the rows that they depend on, and does the rest to what came back. So memory is
a small multiple of the rows asked for. Two nodes need more than rows: a transpose that moves the first axis reads all
of its input, `CHUNK_BYTES` at a time, for each window; and a reduction over the first axis does so once.

Moving numbers about without touching the last axis moves quantized codes as well, since their groups lie along it. The
same walk over the tree then carries a tensor's codes, scales and biases in place of its numbers.

Numbers are computed by MLX in the dtype that the checkpoint would give them, so that they are those of mlx-lm to the
bit. Between nodes floats are float32, which holds bf16 and f16 exactly.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.source import Tensor

if TYPE_CHECKING:
    import mlx.core as mx

CHUNK_BYTES = 32 << 20
"""About how much of an input is in memory at once where rows of it are not enough."""

Arrays = tuple[np.ndarray, ...]
"""What moves through the tree together: (numbers,) or (codes, scales, biases)."""

Read = Callable[["Leaf", int, int], Arrays]
"""Reads rows [start, stop) of a leaf."""

MLX_DTYPES = {
    "BOOL": "bool_", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32",
}  # fmt: skip
"""Safetensors' name of a dtype -> MLX's."""

_NAMES = {mlx.removesuffix("_"): name for name, mlx in MLX_DTYPES.items()}
_FLOATS = ("F16", "BF16", "F32")


def mlx_dtype(name: str) -> Any:
    """Return MLX's dtype for safetensors' name of it, one of MLX_DTYPES."""
    import mlx.core as mx

    return getattr(mx, MLX_DTYPES[name])


def dtype_name(dtype: Any) -> str:
    """Return safetensors' name for a dtype of MLX. Raises FormatError where it has none that is supported."""
    short = str(dtype).rpartition(".")[2].removesuffix("_")
    if short not in _NAMES:
        raise FormatError(f"Arrays of dtype {short} cannot be written; expected one of {', '.join(_NAMES)}.")
    return _NAMES[short]


def to_mlx(array: np.ndarray, dtype: str) -> mx.array:
    """Return an array as MLX's of the dtype that `dtype` names."""
    import mlx.core as mx

    return mx.array(np.asarray(array, order="C")).astype(mlx_dtype(dtype))


def to_numpy(array: mx.array) -> np.ndarray:
    """Return an array of MLX as NumPy's: floats as float32, integers as they are."""
    import mlx.core as mx

    return np.array(array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array)


def height(shape: tuple[int, ...]) -> int:
    """Return the number of rows; a scalar is one."""
    return shape[0] if shape else 1


def row_bytes(expression: Expression) -> int:
    """Return what a row takes in memory, as it moves through the tree."""
    return math.prod(expression.shape[1:]) * 4


class Expression(ABC):
    """An array of `shape` whose `dtype` is safetensors' name of what mlx-lm would hold."""

    shape: tuple[int, ...]
    dtype: str

    @property
    @abstractmethod
    def inputs(self) -> tuple[Expression, ...]:
        """The expressions that this one reads."""

    @property
    def keeps_last_axis(self) -> bool:
        """Whether this only moves runs along the last axis about, each of them whole."""
        return False

    @abstractmethod
    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Return rows [start, stop), each array of shape [stop - start, *shape[1:]]; of a scalar, the scalar."""

    def leaves(self) -> tuple[Leaf, ...]:
        """The tensors this depends on, each once, in the order that it reads them."""
        found: dict[str, Leaf] = {}
        pending: list[Expression] = [self]
        while pending:
            node = pending.pop()
            if isinstance(node, Leaf):
                found.setdefault(node.name, node)
            pending.extend(reversed(node.inputs))
        return tuple(found.values())

    def carries(self) -> bool:
        """Whether rows of the leaves' codes make up rows of this one's."""
        return self.keeps_last_axis and all(node.carries() for node in self.inputs)


@dataclass(frozen=True, eq=False)
class Leaf(Expression):
    """A tensor of the source."""

    tensor: Tensor

    @property
    def name(self) -> str:
        """The tensor's name in the source."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The tensor's."""
        return self.tensor.shape

    @property
    def dtype(self) -> str:  # type: ignore[override]
        """The tensor's."""
        return self.tensor.dtype

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """None."""
        return ()

    @property
    def keeps_last_axis(self) -> bool:
        """True."""
        return True

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Return what `read` reads."""
        return read(self, start, stop)


@dataclass(frozen=True, eq=False)
class _Node(Expression):
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class _Unary(_Node):
    source: Expression

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The one input."""
        return (self.source,)

    def chunks(self, read: Read) -> Iterator[tuple[int, Arrays]]:
        """Yield all rows of the input, a chunk at a time, with the index of a chunk's first."""
        step = max(1, CHUNK_BYTES // max(1, row_bytes(self.source)))
        total = height(self.source.shape)
        for start in range(0, total, step):
            yield start, self.source.rows(start, min(start + step, total), read)


@dataclass(frozen=True, eq=False)
class Constant(_Node):
    """Numbers that depend on no tensor: what is added to a norm's weights, for one."""

    value: np.ndarray

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """None."""
        return ()

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Return the rows."""
        return (self.value[start:stop] if self.shape else self.value,)


@dataclass(frozen=True, eq=False)
class Reshaped(_Unary):
    """The same elements, in the same order, in another shape."""

    @property
    def keeps_last_axis(self) -> bool:
        """Whether the last axis is as long as it was, and rows are made of it."""
        before, after = self.source.shape, self.shape
        return len(before) > 1 and len(after) > 1 and before[-1] == after[-1]

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Read the rows of the input that these rows lie in, and cut off what is beside them."""
        # What is counted are runs along the last axis where it stays, because of codes it is shorter; else elements.
        runs = self.keeps_last_axis
        ours, theirs = (math.prod(shape[1:-1] if runs else shape[1:]) for shape in (self.shape, self.source.shape))
        begin, end = start * ours, stop * ours
        first, last = (begin // theirs, -(-end // theirs)) if theirs else (0, height(self.source.shape))
        out = []
        for array in self.source.rows(first, last, read):
            run = array.shape[-1:] if runs else ()
            shape = (stop - start, *self.shape[1:-1], *run) if runs else self.shape and (stop - start, *self.shape[1:])
            out.append(array.reshape(-1, *run)[begin - first * theirs : end - first * theirs].reshape(shape))
        return tuple(out)


@dataclass(frozen=True, eq=False)
class Joined(_Node):
    """Arrays one after another along `axis`."""

    parts: tuple[Expression, ...]
    axis: int

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts

    @property
    def keeps_last_axis(self) -> bool:
        """Whether it is another axis that they are joined along."""
        return self.axis != len(self.shape) - 1

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for part in self.parts:
            starts.append(starts[-1] + part.shape[self.axis])
        return starts

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Read the parts that the rows lie in; along another axis, the same rows of each."""
        if self.axis:
            found = [part.rows(start, stop, read) for part in self.parts]
        else:
            found = [
                part.rows(max(start, begin) - begin, min(stop, end) - begin, read)
                for part, (begin, end) in zip(self.parts, pairwise(self._starts), strict=True)
                if max(start, begin) < min(stop, end)
            ] or [self.parts[0].rows(0, 0, read)]
        if len(found) == 1:
            return found[0]
        return tuple(np.concatenate(arrays, axis=self.axis) for arrays in zip(*found, strict=True))


@dataclass(frozen=True, eq=False)
class Sliced(_Unary):
    """Elements first, first + step, ... of each axis; `picks` has (first, step) an axis."""

    picks: tuple[tuple[int, int], ...]

    @property
    def keeps_last_axis(self) -> bool:
        """Whether it takes all of the last axis, and there is another."""
        return len(self.shape) > 1 and self.picks[-1] == (0, 1) and self.shape[-1] == self.source.shape[-1]

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Read from the first row that is picked to the last, and pick."""
        first, step = self.picks[0]
        if start == stop:
            return tuple(self._pick(array) for array in self.source.rows(0, 0, read))
        ends = first + start * step, first + (stop - 1) * step
        found = [self._pick(array[::step]) for array in self.source.rows(min(ends), max(ends) + 1, read)]
        # MLX takes no array that lies backwards in memory.
        return tuple(array.copy() if min(array.strides) < 0 else array for array in found)

    def _pick(self, array: np.ndarray) -> np.ndarray:
        cuts = [slice(None)]
        for axis, ((first, step), count) in enumerate(zip(self.picks[1:], self.shape[1:], strict=True), start=1):
            if (first, step) == (0, 1) and count == self.source.shape[axis]:
                cuts.append(slice(None))
                continue
            end = first + count * step
            cuts.append(slice(first, end if end >= 0 else None, step))
        return array[tuple(cuts)]


@dataclass(frozen=True, eq=False)
class Permuted(_Unary):
    """Axes in another order: axis i is the input's axis `order[i]`."""

    order: tuple[int, ...]

    @property
    def keeps_last_axis(self) -> bool:
        """Whether the last axis stays the last."""
        return self.order[-1] == len(self.order) - 1

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Read the same rows of the input; where the first axis was another, that part of all rows."""
        axis = self.order[0]
        if axis == 0:
            return tuple(array.transpose(self.order) for array in self.source.rows(start, stop, read))
        cut = (slice(None),) * axis + (slice(start, stop),)
        # Copied, or a view of a chunk would keep all of it.
        found = [tuple(array[cut].copy() for array in arrays) for _, arrays in self.chunks(read)]
        if not found:
            found = [tuple(array[cut] for array in self.source.rows(0, 0, read))]
        return tuple(np.concatenate(arrays).transpose(self.order) for arrays in zip(*found, strict=True))


@dataclass(frozen=True, eq=False)
class Broadcasted(_Unary):
    """Repeated along axes of length 1, and along new ones in front."""

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Read the same rows of the input, or the only one that it has."""
        shape = (stop - start, *self.shape[1:]) if self.shape else ()
        source = self.source.shape
        if len(source) == len(self.shape) and height(source) != 1:
            arrays = self.source.rows(start, stop, read)
        else:
            arrays = self.source.rows(0, height(source), read)
        return tuple(np.broadcast_to(array, shape) for array in arrays)


@dataclass(frozen=True, eq=False)
class Computed(_Node):
    """A function of MLX applied to inputs of this one's shape, element by element."""

    operands: tuple[Expression, ...]
    function: Callable[..., Any]

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The operands."""
        return self.operands

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Compute these rows from the same rows of the operands."""
        arrays = [to_mlx(operand.rows(start, stop, read)[0], operand.dtype) for operand in self.operands]
        return (to_numpy(self.function(*arrays)),)


@dataclass(frozen=True, eq=False)
class Viewed(_Unary):
    """The bytes of the last axis as another dtype."""

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """View the same rows of the input; of a vector, view it all."""
        vector = len(self.shape) == 1
        (array,) = self.source.rows(*((0, height(self.source.shape)) if vector else (start, stop)), read)
        viewed = to_numpy(to_mlx(array, self.source.dtype).view(mlx_dtype(self.dtype)))
        return (viewed[start:stop] if vector else viewed,)


@dataclass(frozen=True, eq=False)
class Reduced(_Unary):
    """A function of MLX over `axes`, which keep the length 1.

    Over the first axis the rows so far are reduced together with the next ones, in the order in which MLX on a CPU goes
    through them, so that sums are the same to the bit there.
    """

    axes: tuple[int, ...]
    function: Callable[..., Any]
    _whole: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Reduce the same rows; over the first axis, all of them, once."""
        if 0 not in self.axes:
            (array,) = self.source.rows(start, stop, read)
            return (to_numpy(self._reduce(to_mlx(array, self.source.dtype))),)
        with self._lock:
            if "value" not in self._whole:
                self._whole["value"] = self._all(read)
        return (self._whole["value"][start:stop],)

    def _reduce(self, array: Any) -> Any:
        return self.function(array, axis=list(self.axes), keepdims=True)

    def _all(self, read: Read) -> np.ndarray:
        import mlx.core as mx

        so_far: Any = None
        for _, (array,) in self.chunks(read):
            part = to_mlx(array, self.source.dtype)
            if self.axes == (0,) and so_far is not None:
                part = mx.concatenate([so_far, part])
                so_far = self._reduce(part)
            else:
                reduced = self._reduce(part)
                so_far = reduced if so_far is None else self._reduce(mx.concatenate([so_far, reduced]))
            mx.eval(so_far)
        return to_numpy(so_far)


@dataclass(frozen=True, eq=False)
class Whole(_Node):
    """An array that takes all of its tensors: `compute` gives it, and it stays until its last row is read."""

    operands: tuple[Leaf, ...]
    compute: Callable[[], np.ndarray]
    _kept: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensors."""
        return self.operands

    def rows(self, start: int, stop: int, read: Read) -> Arrays:
        """Compute all rows unless they are there, and return these."""
        with self._lock:
            if "value" not in self._kept:
                self._kept["value"] = self.compute()
            value = self._kept["value"]
            if stop == height(self.shape):
                self._kept.clear()
        return (value[start:stop] if self.shape else value,)
