"""A certificate that a model's streamed output is its resident output, one layer at a time.

A model larger than memory cannot be run resident to compare. So each decoder layer is loaded whole and computed twice
on the same input, with its experts resident and with them streamed out of fewer slots than there are experts; what the
resident layer gave goes on to the next, and the layer's memory is given back. The experts' bytes are compared as well,
as the loader and as the store read them.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.experts import anatomy
from edger1.experts.anatomy import LayerExperts
from edger1.experts.budget import least_slots, slots_by_hand
from edger1.experts.figures import MISSES
from edger1.experts.store import Store
from edger1.experts.streaming import Streaming
from edger1.mlx_runtime import clear_cache

SAME_ROWS = 16
"""Rows that go through the model. Up to so many, outputs must be the same bit for bit."""
ROWS = (1, SAME_ROWS, 4 * SAME_ROWS)
"""Rows of each comparison: a token, the most that are computed as one token is, and a piece of a prompt."""
TOLERANCE = {"exact": 1e-4, "fast": 0.05}
"""For more rows: the largest difference, relative to the largest output."""


@dataclass(frozen=True)
class Comparison:
    """One layer's output for so many rows of input, resident and streamed.

    `largest_difference` is relative to the largest output; `misses` is how many experts were read meanwhile.
    """

    rows: int
    resident_sha256: str
    streamed_sha256: str
    largest_difference: float
    misses: int

    @property
    def same(self) -> bool:
        """Whether they are the same bit for bit."""
        return self.resident_sha256 == self.streamed_sha256


@dataclass(frozen=True)
class LayerCertificate:
    """What was compared of one decoder layer."""

    layer: str
    experts: int
    slots: int
    resident_weights_sha256: str
    streamed_weights_sha256: str
    outputs: tuple[Comparison, ...]
    not_compared: tuple[str, ...] = ()
    """Numbers of rows that the layer cannot be called with by itself, and why."""

    def holds(self, precision: str) -> bool:
        """Whether weights are the same, outputs of up to 16 rows as well, and others within rounding."""
        return self.resident_weights_sha256 == self.streamed_weights_sha256 and all(
            c.same if c.rows <= SAME_ROWS else c.largest_difference <= TOLERANCE[precision] for c in self.outputs
        )


@dataclass
class Certificate:
    """What was compared of a model."""

    model: str
    precision: str
    layers: list[LayerCertificate] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """Whether every layer's does."""
        return bool(self.layers) and all(layer.holds(self.precision) for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "model": self.model,
            "precision": self.precision,
            "holds": self.holds,
            "rows_that_must_be_the_same": SAME_ROWS,
            "tolerance_beyond": TOLERANCE[self.precision],
            "layers": [
                asdict(layer)
                | {"holds": layer.holds(self.precision)}
                | {"outputs": [asdict(c) | {"same": c.same} for c in layer.outputs]}
                for layer in self.layers
            ],
        }


def verify(
    path: Path,
    *,
    precision: str = "fast",
    expert_slots: str | int | None = None,
    seed: int = 0,
    on_layer: Callable[[int, int], None] = lambda *_: None,
) -> Certificate:
    """Compare each layer with experts of the model in `path`, on random tokens.

    Needs memory for the largest layer twice and for what is no layer. `expert_slots` as in `edger1.load`; by default a
    quarter of the experts. `on_layer(done, total)` is called after each layer with experts. Runs on the thread that
    owns MLX. Raises FormatError for a model without routed experts, or whose layers are not called as mlx-lm's usually
    are, StreamError where reading fails, UnstreamableError where the files are not laid out for streaming.
    """
    import mlx.core as mx

    from edger1.building import build
    from edger1.folder import inspect

    folder = inspect(path)
    model, _ = build(folder, path.name)
    layers = anatomy.find(model, folder)
    if not layers:
        raise FormatError(f"{path.name} has no routed experts, so there is nothing to stream and nothing to verify.")
    asked = "25%" if expert_slots is None else expert_slots
    slots = [
        # Where every expert had its slot nothing would be read, so nothing would be shown.
        max(least_slots(layer), min(layer.experts - 1, count))
        for layer, count in zip(layers, slots_by_hand(layers, asked), strict=True)
    ]
    walk = _Walk(_decoders(model, layers), slots, Certificate(path.name, precision), on_layer)
    with walk.hooked():
        tokens = np.random.default_rng(seed).integers(0, _vocabulary(model), (1, SAME_ROWS))
        mx.eval(model(mx.array(tokens)))
    if len(walk.certificate.layers) != len(walk.moe):
        raise FormatError(
            f"{path.name}: only {len(walk.certificate.layers)} of {len(walk.moe)} layers with experts were called as a "
            f"layer of their own, so it cannot be verified layer by layer."
        )
    return walk.certificate


def _vocabulary(model: Any) -> int:
    """Return how many tokens every embedding of a model has: configs name that number differently.

    A token beyond an embedding's rows is read from whatever memory lies there.
    """
    import mlx.nn as nn

    rows = [
        module["weight"].shape[0]
        for _, module in anatomy.modules(model)
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    if not rows:
        raise FormatError("The model has no embedding of tokens, so it cannot be verified with random ones.")
    return int(min(rows))


@dataclass(frozen=True)
class _Decoder:
    """A decoder layer, its class, and the layers of experts inside it."""

    path: str
    module: Any
    kind: Any
    inside: tuple[LayerExperts, ...]


def _decoders(model: Any, layers: Sequence[LayerExperts]) -> list[_Decoder]:
    found = []
    for path, module in anatomy.modules(model):
        owner, _, number = path.rpartition(".")
        if number.isdigit() and owner.rpartition(".")[2] in ("layers", "h", "blocks"):
            inside = tuple(layer for layer in layers if layer.path.startswith(path + "."))
            found.append(_Decoder(path, module, type(module), inside))
    return found


class _Walk:
    """One pass of a model through its decoder layers, each compared, passed and given back."""

    def __init__(
        self,
        decoders: Sequence[_Decoder],
        slots: Sequence[int],
        certificate: Certificate,
        on_layer: Callable[[int, int], None],
    ) -> None:
        self._decoders = {id(decoder.module): decoder for decoder in decoders}
        self.moe = [decoder for decoder in decoders if decoder.inside]
        self._slots = slots
        self.certificate = certificate
        self._on_layer = on_layer

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Let calls of the decoder layers come here."""
        for decoder in self._decoders.values():
            object.__setattr__(decoder.module, "_walk", self)
            decoder.module.__class__ = _visited(decoder.kind)
        try:
            yield
        finally:
            for decoder in self._decoders.values():
                decoder.module.__class__ = decoder.kind
                vars(decoder.module).pop("_walk", None)

    def visit(self, module: Any, x: Any, args: Any, kwargs: Any) -> Any:
        """Compare a layer, and return what it gives with everything resident."""
        import mlx.core as mx

        decoder = self._decoders[id(module)]
        mx.eval(x)
        module.__class__ = decoder.kind
        resident = _parts(module, decoder.inside)
        if decoder.inside:
            self.certificate.layers.append(self._compare(decoder, x, args, kwargs))
            self._on_layer(len(self.certificate.layers), len(self.moe))
        for linear, name, array in resident:
            linear[name] = array
        result = module(x, *args, **kwargs)
        mx.eval(result)
        _give_back(module)
        clear_cache()
        return result

    def _compare(self, decoder: _Decoder, x: Any, args: Any, kwargs: Any) -> LayerCertificate:
        module, precision = decoder.module, self.certificate.precision
        first = len(decoder.path) + 1
        layers = [replace(layer, index=i, path=layer.path[first:]) for i, layer in enumerate(decoder.inside)]
        slots = [self._slots[layer.index] for layer in decoder.inside]
        switches = dict(anatomy.switches(module))
        resident_weights = _sha256([_resident_bytes(switches[layer.path], layer) for layer in layers])
        resident, left_out = {}, []
        with _running(module, precision):
            for rows in ROWS:
                try:
                    resident[rows] = _output(module, x, args, kwargs, rows)
                except Exception as error:
                    # With its own rows it was called before; another number may not suit what else it is given.
                    if rows == x.shape[1]:
                        raise
                    left_out.append(f"{rows} rows: {type(error).__name__}: {str(error)[:200]}")
        streaming = Streaming(layers, slots)
        try:
            streamed_weights = _sha256([_stored_bytes(streaming.store, layer) for layer in layers])
            streaming.attach(module)
            outputs = []
            with _running(module, precision, streaming):
                for rows, expected in resident.items():
                    before = streaming.figures[:, MISSES].sum()
                    got = _output(module, x, args, kwargs, rows)
                    misses = int(streaming.figures[:, MISSES].sum() - before)
                    outputs.append(_comparison(rows, expected, got, misses))
        finally:
            streaming.close()
        return LayerCertificate(
            layer=decoder.path,
            experts=sum(layer.experts for layer in layers),
            slots=sum(slots),
            resident_weights_sha256=resident_weights,
            streamed_weights_sha256=streamed_weights,
            outputs=tuple(outputs),
            not_compared=tuple(left_out),
        )


@cache
def _visited(original: Any) -> Any:
    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        return vars(self)["_walk"].visit(self, x, args, kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _parts(module: Any, layers: Sequence[LayerExperts]) -> list[tuple[Any, str, Any]]:
    """Return the arrays of a layer's experts, each with the module that holds it and its name there."""
    if not layers:
        return []
    linears = [linear for _, switch in anatomy.switches(module) for _, linear in anatomy.projections(switch)]
    return [(linear, name, a) for linear in linears for name, a in linear.items() if hasattr(a, "shape")]


@contextlib.contextmanager
def _running(module: Any, precision: str, streaming: Streaming | None = None) -> Iterator[None]:
    """Let a layer run inside as it does in a loaded model, its experts resident or streamed."""
    from edger1.kernels.install import install

    with contextlib.nullcontext() if streaming is None else streaming.sleeping():
        installed = install(module, "exact" if precision == "exact" else "fast")
    try:
        if streaming is not None:
            streaming.fuse(module, installed)
        yield
    finally:
        installed.uninstall()


def _output(module: Any, x: Any, args: Any, kwargs: Any, rows: int) -> Any:
    """Return a layer's output for `rows` rows: those of x, its first ones, or all of them again and again."""
    import mlx.core as mx

    had = x.shape[1]
    # Some layers write into what they are given.
    args, kwargs = _copied(args), _copied(kwargs)
    if rows != had:
        args = tuple(_with_rows(argument, had, rows) for argument in args)
        kwargs = {name: _with_rows(argument, had, rows) for name, argument in kwargs.items()}
        x = _with_rows(x, had, rows)
    found = module(x, *args, **kwargs)
    found = found[0] if isinstance(found, tuple) else found
    mx.eval(found)
    return np.array(found.astype(mx.float32))


def _copied(argument: Any) -> Any:
    import mlx.nn as nn

    if isinstance(argument, list | tuple):
        return type(argument)(_copied(part) for part in argument)
    if isinstance(argument, dict):
        return {name: _copied(part) for name, part in argument.items()}
    if type(argument).__module__.startswith("mlx_lm.") and not isinstance(argument, nn.Module):
        own = copy.copy(argument)
        for name, part in vars(argument).items():
            object.__setattr__(own, name, _copied(part))
        return own
    return argument


def _with_rows(argument: Any, had: int, rows: int) -> Any:
    """Return an argument of a layer for `rows` rows instead of the `had` that it has: the first, or all repeatedly.

    Masks are left out: any attention will do where both sides have the same.
    """
    import mlx.core as mx

    if isinstance(argument, list | tuple):
        return type(argument)(_with_rows(part, had, rows) for part in argument)
    if isinstance(argument, str):
        return None
    if not isinstance(argument, mx.array) or had not in argument.shape[:3]:
        return argument
    if argument.ndim >= 2 and argument.shape[-2:] == (had, had):
        return None
    # [batch, rows, ...], or [batch, heads, rows, ...] of keys and values.
    axis = 1 if argument.ndim > 1 and argument.shape[1] == had else argument.shape.index(had)
    whole = mx.concatenate([argument] * -(-rows // had), axis=axis)
    return mx.split(whole, [rows], axis=axis)[0]


def _comparison(rows: int, resident: Any, streamed: Any, misses: int) -> Comparison:
    largest = float(np.abs(resident).max()) or 1.0
    off = float(np.abs(resident - streamed).max()) / largest
    return Comparison(rows, _sha256([[resident]]), _sha256([[streamed]]), off, misses)


def _sha256(of: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for arrays in of:
        for array in arrays:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def _resident_bytes(switch: Any, layer: LayerExperts) -> Iterator[Any]:
    """Yield what the loader read, expert by expert, each in the order of its parts."""
    import mlx.core as mx

    linears = dict(anatomy.projections(switch))
    for expert in range(layer.experts):
        for part in layer.parts:
            yield np.array(linears[part.projection][part.name][expert].reshape(-1).view(mx.uint8))


def _stored_bytes(store: Store, layer: LayerExperts) -> Iterator[Any]:
    """Yield the same as the store reads it."""
    for expert in range(layer.experts):
        into = [np.zeros(part.nbytes, np.uint8) for part in layer.parts]
        read = store.read(layer, expert, into)
        read.wait()
        if read.error is not None:
            raise read.error
        yield from into


def _give_back(module: Any) -> None:
    """Drop a layer's arrays: it is not called again."""
    import mlx.core as mx

    for _, part in anatomy.modules(module):
        for name, value in list(part.items()):
            if isinstance(value, mx.array):
                part[name] = mx.zeros((0,), dtype=value.dtype)
