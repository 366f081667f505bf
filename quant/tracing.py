"""What mlx-lm makes of a checkpoint's tensors, without the tensors: a record of `Model.sanitize`.

mlx-lm brings the tensors of a checkpoint into the shape of its model in `Model.sanitize`, one for each architecture:
experts are stacked, projections split, renamed and transposed, here and there a number is added. `sanitize` wants all
tensors in memory. Here it runs once on placeholders, inside `mx.export_function`, which records the operations of MLX
and computes none. Each array that comes out is an expression (expressions.py) over the source's tensors, any rows of
which can be read, so that a model of any size passes through a fixed amount of memory.

So no architecture needs code of its own, and what is read is what mlx-lm would have computed, to the bit. The limits:

- Where `sanitize` does something to an array that expressions do not know, that array is computed whole by `sanitize`
  itself, from the tensors that it depends on; over `MAX_WHOLE_BYTES` of them are refused.
- Where `sanitize` looks at numbers, it is given those of tensors up to `MAX_VALUE_BYTES`, and refused more.

`mlx_lm` is imported here; a program that minds what that changes in the process imports it its own way before.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant import expressions
from edger1.quant.architecture import Classes, Linear, build, linears_of
from edger1.quant.expressions import MLX_DTYPES, Expression, Leaf, dtype_name, mlx_dtype, to_mlx, to_numpy
from edger1.quant.source import Tensor
from edger1.quant.targets import Packed, Plain, Target

MAX_WHOLE_BYTES = 1 << 30
MAX_VALUE_BYTES = 1 << 16

_PATCHING = threading.Lock()


@dataclass(frozen=True)
class Traced:
    """What becomes of a source's tensors in mlx-lm's model.

    `tensors` are the model's arrays by name, in the order of the model's layers, each a `Tensor` itself. `linears` are
    the modules that can be quantized. `mtp` names the source's tensors of layers for multi-token prediction, which
    mlx-lm leaves out; `dropped` those that it leaves out besides (vision towers, position tables, a tied head).
    """

    tensors: Mapping[str, Target]
    linears: Mapping[str, Linear]
    mtp: tuple[str, ...]
    dropped: tuple[str, ...]


def trace(config: dict[str, Any], tensors: Mapping[str, Tensor], classes: Classes | None = None) -> Traced:
    """Record what mlx-lm's model of `config` makes of `tensors`. Reads none of them, but see above.

    `classes` are Model and ModelArgs, where it is not mlx-lm's own for the config's model_type.

    Raises FormatError where mlx-lm has no such architecture, where the tensors are not those that the model has, or
    where what `sanitize` does cannot be followed.
    """
    record = _record(config, tensors, classes)
    linears = linears_of(record.model)
    parameters = record.parameters()
    found = _pack(record, linears, parameters)
    mtp = {name for name in tensors if _is_mtp(name, config)}
    kept = {name: target for name, target in found.items() if name in parameters or not mtp.issuperset(target.sources)}
    _check(record.family, kept, parameters)
    used = {name for target in kept.values() for name in target.sources} | record.looked_at
    return Traced(
        # In the model's order, which is that of its layers.
        tensors={name: kept[name] for name in parameters if name in kept},
        linears=linears,
        mtp=tuple(name for name in tensors if name in mtp and name not in used),
        dropped=tuple(name for name in tensors if name not in mtp and name not in used),
    )


@dataclass(frozen=True)
class _Record:
    """What `sanitize` made: expressions by name, of the model as it is afterwards."""

    family: str
    model: Any
    expressions: dict[str, Expression]
    looked_at: frozenset[str]

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the model's parameters."""
        from mlx.utils import tree_flatten

        return {name: tuple(array.shape) for name, array in tree_flatten(self.model.parameters())}


def _record(config: dict[str, Any], tensors: Mapping[str, Tensor], classes: Classes | None) -> _Record:
    family = str(config.get("model_type"))
    known: dict[str, Any] = {}
    while True:
        model = build(config, classes)
        leaves = {name: Leaf(tensor) for name, tensor in tensors.items()}
        if not hasattr(model, "sanitize"):
            return _Record(family, model, dict(leaves), frozenset())
        events: list[dict[str, Any]] = []
        outputs: dict[str, Any] = {}
        try:
            names, direct = _run(model, leaves, known, events, outputs)
            break
        except ValueError as error:
            # MLX's words where something wants to see the numbers of a placeholder.
            if "Attempting to eval" not in str(error) or known:
                raise _unfollowed(family, error) from error
            known = {
                name: to_mlx(tensor.read(0, expressions.height(tensor.shape)).reshape(tensor.shape), tensor.dtype)
                for name, tensor in tensors.items()
                if math.prod(tensor.shape) * 4 <= MAX_VALUE_BYTES
            }
        except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
            raise _unfollowed(family, error) from error

    def compute(name: str, needed: Sequence[Leaf]) -> np.ndarray:
        return _compute(config, classes, tensors, name, needed)

    graph = _Graph(events, [leaf for name, leaf in leaves.items() if name not in known], compute)
    found = {name: graph.output(place, name) for place, name in enumerate(names)} | direct
    return _Record(family, model, {name: found[name] for name in outputs}, frozenset(known))


def _unfollowed(family: str, error: Exception) -> FormatError:
    if isinstance(error, KeyError) and error.args and isinstance(error.args[0], str):
        return FormatError(
            f"This is no whole {family} model as mlx-lm has it: it lacks {error.args[0]}. "
            "Check that config.json and all shards belong together."
        )
    return FormatError(
        f"mlx-lm's sanitize for {family} could not be followed on these tensors ({error}). Either they are not those "
        "of such a model, or it does what cannot be recorded; try mlx_lm.convert."
    )


def _run(
    model: Any,
    leaves: dict[str, Leaf],
    known: Mapping[str, Any],
    events: list[dict[str, Any]],
    outputs: dict[str, Any],
) -> tuple[list[str], dict[str, Expression]]:
    """Run `sanitize` in `mx.export_function`; return names of what was recorded, and known tensors that came out."""
    import mlx.core as mx

    unknown = [name for name in leaves if name not in known]
    names: list[str] = []
    direct: dict[str, Expression] = {}

    def traced(*placeholders: Any) -> list[Any]:
        given = dict(zip(unknown, placeholders, strict=True))
        outputs.clear()
        outputs.update(model.sanitize({name: known.get(name, given.get(name)) for name in leaves}))
        names.clear()
        by_identity = {id(array): name for name, array in known.items()}
        for name, array in outputs.items():
            if id(array) in by_identity:
                direct[name] = leaves[by_identity[id(array)]]
            else:
                names.append(name)
        return [outputs[name] for name in names]

    placeholders = [_placeholder(leaves[name].tensor) for name in unknown]
    with _contiguous_left_out():
        mx.export_function(events.append, traced, *placeholders)
    return names, direct


def _placeholder(tensor: Tensor) -> Any:
    """Return an array of the tensor's shape and dtype, which takes no memory unless something looks at it."""
    import mlx.core as mx

    if tensor.dtype not in MLX_DTYPES:
        raise FormatError(
            f"{tensor.name!r} is of dtype {tensor.dtype}, which MLX has not; expected one of {', '.join(MLX_DTYPES)}."
        )
    return mx.zeros(tensor.shape, mlx_dtype(tensor.dtype))


@contextlib.contextmanager
def _contiguous_left_out() -> Iterator[None]:
    """Make `mx.contiguous` return its argument, on this thread: it is the one operation in use that is not recorded.

    How an array lies in memory is nothing that an expression knows of.
    """
    import mlx.core as mx

    thread = threading.get_ident()
    with _PATCHING:
        contiguous = mx.contiguous

        def leave_out(array: Any, *args: Any, **kwargs: Any) -> Any:
            return array if threading.get_ident() == thread else contiguous(array, *args, **kwargs)

        mx.contiguous = leave_out
        try:
            yield
        finally:
            mx.contiguous = contiguous


def _compute(
    config: dict[str, Any],
    classes: Classes | None,
    tensors: Mapping[str, Tensor],
    name: str,
    needed: Sequence[Leaf],
) -> np.ndarray:
    """Run `sanitize` on the tensors that the array `name` depends on, and placeholders for the rest."""
    real = {leaf.name for leaf in needed}
    given = {}
    for key, tensor in tensors.items():
        if key in real:
            numbers = tensor.read(0, expressions.height(tensor.shape)).reshape(tensor.shape)
            given[key] = to_mlx(numbers, tensor.dtype)
        else:
            given[key] = _placeholder(tensor)
    return to_numpy(build(config, classes).sanitize(given)[name])


class _UnknownError(Exception):
    """An operation that expressions have no node for."""


class _Graph:
    """The recorded operations, made into expressions from the outputs back."""

    def __init__(
        self,
        events: Sequence[dict[str, Any]],
        leaves: Sequence[Leaf],
        compute: Callable[[str, Sequence[Leaf]], np.ndarray],
    ) -> None:
        self._compute = compute
        self._made: dict[str, Expression] = {}
        self._by: dict[str, tuple[dict[str, Any], int]] = {}
        self._outputs: list[tuple[str, tuple[int, ...], Any]] = []
        for event in events:
            if event["type"] == "inputs":
                self._made.update((key, leaf) for (key, *_), leaf in zip(event["inputs"], leaves, strict=True))
            elif event["type"] == "outputs":
                self._outputs = event["outputs"]
            elif event["type"] == "constants":
                for key, array in event["constants"]:
                    value = to_numpy(array)
                    self._made[key] = expressions.Constant(value.shape, dtype_name(array.dtype), value)
            elif event["type"] == "primitive":
                self._by.update((key, (event, place)) for place, (key, *_) in enumerate(event["outputs"]))

    def output(self, place: int, name: str) -> Expression:
        """Return the expression of output number `place`, which is the model's array `name`."""
        key, shape, dtype = self._outputs[place]
        try:
            return self._expression(key)
        except _UnknownError as error:
            leaves = self._leaves(key)
            nbytes = sum(math.prod(leaf.shape) * 4 for leaf in leaves)
            if nbytes > MAX_WHOLE_BYTES:
                raise FormatError(
                    f"mlx-lm computes {name!r} with {error}, for which all of {len(leaves)} tensors have to be in "
                    f"memory, {nbytes:,} bytes; {MAX_WHOLE_BYTES:,} are allowed. Try mlx_lm.convert."
                ) from None
            return expressions.Whole(tuple(shape), dtype_name(dtype), leaves, lambda: self._compute(name, leaves))

    def _leaves(self, key: str) -> tuple[Leaf, ...]:
        found: dict[str, Leaf] = {}
        seen, pending = {key}, [key]
        while pending:
            key = pending.pop()
            if key in self._by:
                new = [source for source, *_ in self._by[key][0]["inputs"] if source not in seen]
                seen.update(new)
                pending.extend(new)
            elif isinstance(leaf := self._made[key], Leaf):
                found[leaf.name] = leaf
        return tuple(found.values())

    def _expression(self, key: str) -> Expression:
        if key not in self._made:
            event, place = self._by[key]
            inputs = [self._expression(source) for source, *_ in event["inputs"]]
            _, shape, dtype = event["outputs"][place]
            self._made[key] = _node(event["name"], event["arguments"], inputs, tuple(shape), dtype_name(dtype), place)
        return self._made[key]


_RESHAPES = ("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze")
_SAME = ("Copy", "StopGradient", "Full", "Contiguous")
_REDUCTIONS = {2: "sum", 3: "prod", 4: "min", 5: "max"}
"""The numbers of MLX's Reduce::ReduceType."""
_FUNCTIONS = {
    "Add": "add", "Subtract": "subtract", "Multiply": "multiply", "Divide": "divide", "Negative": "negative",
    "Square": "square", "Abs": "abs", "Exp": "exp", "Maximum": "maximum", "Minimum": "minimum", "Power": "power",
}  # fmt: skip
"""MLX's operations of an element at a time -> its functions of the same."""


def _node(
    name: str, arguments: Sequence[Any], inputs: list[Expression], shape: tuple[int, ...], dtype: str, place: int
) -> Expression:
    """Return the node for one recorded operation. Raises _UnknownError where there is none."""
    import mlx.core as mx

    first = inputs[0]
    if name in _SAME:
        return first
    if name in _RESHAPES:
        return expressions.Reshaped(shape, dtype, first)
    if name == "Concatenate":
        return expressions.Joined(shape, dtype, tuple(inputs), arguments[0] % len(shape))
    if name == "Transpose":
        return expressions.Permuted(shape, dtype, first, tuple(arguments[0]))
    if name == "Slice":
        starts, _, steps = arguments
        return expressions.Sliced(shape, dtype, first, tuple(zip(starts, steps, strict=True)))
    if name == "Split":
        cuts, axis = arguments
        begins = [0] * len(shape)
        begins[axis] = [0, *cuts][place]
        return expressions.Sliced(shape, dtype, first, tuple((begin, 1) for begin in begins))
    if name == "Gather":
        return _picked(arguments, inputs, shape, dtype)
    if name == "Broadcast":
        return expressions.Broadcasted(shape, dtype, first)
    if name == "View":
        return expressions.Viewed(shape, dtype, first)
    if name == "AsType":
        wanted = arguments[0]
        return expressions.Computed(shape, dtype, (first,), lambda array: array.astype(wanted))
    if name == "Reduce" and arguments[0] in _REDUCTIONS:
        reduce = getattr(mx, _REDUCTIONS[arguments[0]])
        return expressions.Reduced(shape, dtype, first, tuple(arguments[1]), reduce)
    if name == "Sqrt":
        return expressions.Computed(shape, dtype, (first,), mx.rsqrt if arguments[0] else mx.sqrt)
    if name in _FUNCTIONS:
        return expressions.Computed(shape, dtype, tuple(inputs), getattr(mx, _FUNCTIONS[name]))
    raise _UnknownError(name)


def _picked(arguments: Sequence[Any], inputs: list[Expression], shape: tuple[int, ...], dtype: str) -> Expression:
    """Return the slice that indexing with whole numbers, v[3], is."""
    axes, sizes = arguments
    source, *indices = inputs
    begins = [0] * len(source.shape)
    for axis, index in zip(axes, indices, strict=True):
        if not isinstance(index, expressions.Constant) or index.shape or index.value < 0:
            raise _UnknownError("Gather")
        begins[axis] = int(index.value)
    sliced = expressions.Sliced(tuple(sizes), dtype, source, tuple((begin, 1) for begin in begins))
    return expressions.Reshaped(shape, dtype, sliced)


def _pack(
    record: _Record, linears: Mapping[str, Linear], parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, Target]:
    """Join what `sanitize` leaves quantized, three arrays a weight, to one tensor with a coding."""
    cast = getattr(record.model, "cast_predicate", lambda _: True)
    found = record.expressions
    joined: dict[str, Target] = {}
    for name, expression in found.items():
        path, _, part = name.rpartition(".")
        packed = f"{path}.scales" in found and f"{path}.scales" not in parameters
        if not packed or part not in ("weight", "scales", "biases"):
            joined[name] = Plain(name, expression, bool(cast(name)))
        elif part == "weight":
            if path not in linears:
                raise FormatError(f"{name!r} is quantized in the source, but mlx-lm cannot hold {path} quantized.")
            biases = found.get(f"{path}.biases")
            joined[name] = Packed.of(name, linears[path].shape, expression, found[f"{path}.scales"], biases)
    return joined


def _is_mtp(name: str, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor is one of multi-token prediction: by its name, or in a layer after the last."""
    parts = name.split(".")
    if any(part == "mtp" or part.startswith("mtp_") for part in parts):
        return True
    text = config.get("text_config") or config
    count = text.get("num_hidden_layers", config.get("num_hidden_layers"))
    if not isinstance(count, int):
        return False
    return any(before == "layers" and number.isdigit() and int(number) >= count for before, number in pairwise(parts))


def _check(family: str, found: Mapping[str, Target], parameters: Mapping[str, tuple[int, ...]]) -> None:
    """Raise FormatError unless the arrays are those of the model."""
    for problem, names in (
        ("lacks", [name for name in parameters if name not in found]),
        ("has no place for", [name for name in found if name not in parameters]),
    ):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise FormatError(
                f"This is no whole {family} model as mlx-lm has it: it {problem} {', '.join(names[:4])}{more}. "
                "Check that config.json and all shards belong together."
            )
    for name, target in found.items():
        if target.shape != parameters[name]:
            raise FormatError(
                f"{name!r} has the shape {list(target.shape)}, but config.json asks for {list(parameters[name])}. "
                "Check that config.json and the shards belong together."
            )
