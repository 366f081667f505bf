"""Optimistic windows: decoder layers go on without waiting for their routers' choices, which are read back together.

A streamed MoE layer needs to know which experts its router chose, because some may have to be brought in. On an Apple
GPU asking costs several times what the layer itself takes (`device.py`). So:

- A layer whose experts are all in slots never asks: the table of slots lies on the device.
- Other layers go on as if nothing were missing, a missing expert's rows computed with slot 0. After a window of W such
  layers one read-back fetches all their choices. Up to the first layer that missed everything was right. Its experts
  are brought in; caches from that layer on are taken back; it is computed again from the input that it had, and so are
  the layers after it, unchecked again. At the last such layer of the model everything is checked before it leaves.
- W is chosen while running (`window_width.py`); at W = 1 a layer reads back before it computes its experts.

The result is that of reading back in every layer, bit for bit: what is not right is computed again from what was.

Nothing but a layer's own call may depend on what a layer answered, or it would keep what was computed on wrong input.
mlx-lm's models hand a layer's answer to the next layer, some to later ones too (as arguments, which are exchanged when
layers are computed again); but some gather it on the side. So the first token is computed twice: reading back
everywhere, and in windows where every second layer answers NaN until it is computed again. Only where both have the
same bits are windows used.

While a window is open nobody else may fill slots that its tables name. A slot that was given to another expert before
the check counts as missed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache as memoized
from functools import partial
from itertools import dropwhile
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edger1.errors import EdgeR1Error
from edger1.experts.device import Device
from edger1.experts.rewind import Rewind, is_cache, keep
from edger1.experts.window_width import WidthController

_PROOF_WIDTH = 4
Integers = npt.NDArray[np.int32]


class Slots(Protocol):
    """What is used of a layer's bank (`bank.py`)."""

    table: Integers
    """[experts]: the slot of each expert, below 0 where it is in none."""
    policy: Any
    """Is told which experts each token used (`policy.py`)."""

    def ensure(self, experts: Sequence[int], keep: Collection[int]) -> None:
        """Bring experts in and wait for them; none of `keep` has to leave."""
        ...


@dataclass
class _Choice:
    """What the router of an unchecked MoE layer chose, on the device, and the table it was translated with."""

    layer: int
    indices: Any
    table: Integers


@dataclass
class _Call:
    """One decoder layer's call within the open window: all that it takes to do it again."""

    run: Callable[..., Any]
    args: Any
    kwargs: Any
    output: Any = None
    caches: list[Rewind] = field(default_factory=list)
    choices: list[_Choice] = field(default_factory=list)


@dataclass
class _Table:
    """A bank's table on the device, with 0 where an expert is missing."""

    of: Integers
    array: Any
    complete: bool


class Windows:
    """The windows of one model; made by `install`."""

    def __init__(self, banks: Sequence[Slots], device: Device, places: Sequence[int]) -> None:
        self.device = device
        self.controller = WidthController(len(banks))
        self.reason = ""
        """Why this model's layers are read back one by one, empty where they are not."""
        self._banks = banks
        # Position among the decoder layers of each MoE layer, and the last one that may miss.
        self._places, self._last = places, -1
        self._mode: Literal["away", "each", "window"] = "away"
        self._width = 1
        self._proved = False
        self._open: list[_Call] = []
        self._call: _Call | None = None
        # id of an array that a layer answered on wrong input -> that array, and what the layer answers.
        self._exchanged: dict[int, tuple[Any, Any]] = {}
        # MoE layer -> its choice, where that is known before the layer runs again.
        self._known: dict[int, Integers] = {}
        # MoE layers that are taken to have missed, once each, while it is tried whether windows are exact.
        self._forced: set[int] = set()
        self._tables: list[_Table | None] = [None] * len(banks)
        self._layers_since, self._since = 0, 0.0
        self._timed = False
        # What the last token left to compute may still read slots.
        self._unfinished: Any = None
        self._classes: list[tuple[Any, type]] = []

    def on_use(self, layer: int, experts: Sequence[int]) -> None:
        """Is called with the distinct experts of each choice that was read back; for whoever counts to replace."""

    def uninstall(self) -> None:
        """Give the modules their classes back."""
        for module, original in reversed(self._classes):
            module.__class__ = original
            vars(module).pop("_windows", None)
            vars(module).pop("_place", None)
        self._classes = []

    def _swap(self, module: Any, kind: Callable[[Any], type], place: int = 0) -> None:
        self._classes.append((module, type(module)))
        # Past nn.Module, which would take it for a parameter.
        object.__setattr__(module, "_windows", self)
        object.__setattr__(module, "_place", place)
        module.__class__ = kind(type(module))

    def __deepcopy__(self, _: Any) -> None:
        # A copy of a module has no bank.
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    def slots(self, layer: int, indices: Any) -> Any:
        """Return the slots of the experts that MoE layer `layer` chose, both uint32 arrays of the same shape.

        To be called by whoever stands in for the layer's experts, with the experts it was asked for. None where the
        pass is not one token: many may need more experts than there are slots.
        """
        import mlx.core as mx

        if self._mode == "away":
            return None
        bank = self._banks[layer]
        known = self._known.pop(layer, None)
        if known is not None:
            return mx.array(bank.table[known].astype(np.uint32))
        table = self._table(layer)
        if table.complete:
            return mx.take(table.array, indices)
        if self._mode == "each" or self._call is None:
            chosen = self._read_back([indices])[0]
            self._bring(layer, chosen, full=bool((bank.table[chosen] >= 0).all()))
            return mx.array(bank.table[chosen].astype(np.uint32))
        self._call.choices.append(_Choice(layer, indices, table.of))
        return mx.take(table.array, indices)

    def call_model(self, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a whole model."""
        if self._mode != "away" or not _one_token(args, kwargs):
            return run(*args, **kwargs)
        tables = [self._table(layer) for layer in range(len(self._banks))]
        uncertain = [layer for layer, table in enumerate(tables) if not table.complete]
        self._last = max((self._places[layer] for layer in uncertain), default=-1)
        if uncertain and not self.reason and not self._proved:
            return self._prove(run, args, kwargs, uncertain)
        width = 1 if self.reason else self.controller.next(uncertain, max(self._places) + 1)
        return self._pass(run, args, kwargs, width)

    def call_layer(self, place: int, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a decoder layer, the `place`th of the model."""
        if self._mode != "window":
            if not self._proved and not self.reason:
                self.reason = _unrepeatable((args, kwargs))
            output = run(*args, **kwargs)
            if self._mode == "each":
                self._count()
            return output
        call = _Call(run, *self._renewed((args, kwargs)))
        self._run(call)
        if self._open or call.choices:
            self._open.append(call)
        last = place == self._last
        if self._unchecked and (last or self._unchecked >= self._width):
            self._check(to_the_end=last)
        return call.output

    @property
    def _unchecked(self) -> int:
        return sum(len(call.choices) for call in self._open)

    def _pass(self, run: Callable[..., Any], args: Any, kwargs: Any, width: int, *, timed: bool = True) -> Any:
        caches = [keep(cache) for cache in _caches((args, kwargs))]
        self._mode, self._width, self._timed = "each" if width <= 1 else "window", width, timed
        self._layers_since, self._since = 0, self.device.now()
        try:
            output = run(*args, **kwargs)
            if self._open:
                # The model left out the layers at its end this time.
                for back in caches:
                    back()
                self._mode = "each"
                output = run(*args, **kwargs)
            self._unfinished = output
            return output
        finally:
            self._mode, self._open, self._known, self._exchanged = "away", [], {}, {}

    def _prove(self, run: Callable[..., Any], args: Any, kwargs: Any, uncertain: list[int]) -> Any:
        """Compute the first token reading back everywhere; and again, to see whether windows give the same."""
        import mlx.core as mx

        caches = _caches((args, kwargs))
        before = [keep(cache, whole=True) for cache in caches]
        expected = self._pass(run, args, kwargs, 1, timed=False)
        if self.reason:
            return expected
        mx.eval(expected, [cache.state for cache in caches])
        after = [keep(cache, whole=True) for cache in caches]
        for back in before:
            back()
        self._forced = set(uncertain[1::2] or uncertain)
        try:
            got = self._pass(run, args, kwargs, _PROOF_WIDTH, timed=False)
            if not _same(expected, got):
                self.reason = "what its layers answer is used elsewhere than in the layers that follow"
        except EdgeR1Error:
            raise
        except Exception as error:
            self.reason = f"computing layers again fails ({type(error).__name__}: {error})"
        finally:
            self._forced = set()
            for back in after:
                back()
        self._proved = True
        return expected

    def _run(self, call: _Call) -> None:
        call.caches = [keep(cache) for cache in _caches((call.args, call.kwargs))]
        call.choices = []
        self._call = call
        try:
            call.output = call.run(*call.args, **call.kwargs)
        finally:
            self._call = None
        if any(choice.layer in self._forced for choice in call.choices):
            call.output = _spoilt(call.output)
        self._count()

    def _count(self) -> None:
        self._layers_since += 1
        self.device.computed(1)

    def _check(self, *, to_the_end: bool) -> None:
        """Read back what is unchecked, compute again from the first layer that missed, until few enough are left."""
        while self._unchecked and (to_the_end or self._unchecked >= self._width):
            unchecked = [(call, choice) for call in self._open for choice in call.choices]
            read = self._read_back([choice.indices for _, choice in unchecked])
            for number, ((call, choice), chosen) in enumerate(zip(unchecked, read, strict=True), 1):
                full = self._holds(choice, chosen)
                self._bring(choice.layer, chosen, full=full)
                if not full:
                    checked = zip(unchecked[:number], read, strict=False)
                    self._known = {right.layer: experts for (of, right), experts in checked if of is call}
                    self._again(call)
                    break
            else:
                self._open = []

    def _again(self, first: _Call) -> None:
        """Take the caches back to where they were before `first`, and compute from there on."""
        calls = self._open[next(i for i, call in enumerate(self._open) if call is first) :]
        for call in reversed(calls):
            for back in reversed(call.caches):
                back()
        for call in calls:
            call.args, call.kwargs = self._renewed((call.args, call.kwargs))
            wrong = call.output
            self._run(call)
            for old, new in zip(_arrays(wrong), _arrays(call.output), strict=True):
                if old is not new:
                    self._exchanged[id(old)] = (old, new)
        self._open = list(dropwhile(lambda call: not call.choices, calls))

    def _renewed(self, arguments: tuple[Any, Any]) -> Any:
        """Return arguments with what layers answer in place of what they answered on wrong input."""

        def newest(array: Any) -> Any:
            while id(array) in self._exchanged:
                array = self._exchanged[id(array)][1]
            return array

        args, kwargs = arguments
        return _mapped(newest, args), {name: _mapped(newest, value) for name, value in kwargs.items()}

    def _holds(self, choice: _Choice, chosen: Integers) -> bool:
        if choice.layer in self._forced:
            self._forced.discard(choice.layer)
            return False
        slots = choice.table[chosen]
        return bool((slots >= 0).all() and (self._banks[choice.layer].table[chosen] == slots).all())

    def _read_back(self, indices: Sequence[Any]) -> list[Integers]:
        import mlx.core as mx

        together = indices[0].reshape(-1) if len(indices) == 1 else mx.concatenate([i.reshape(-1) for i in indices])
        read = self.device.read_back(together)
        now = self.device.now()
        if self._timed and self._layers_since:
            self.controller.costs.add(self._layers_since, now - self._since)
        self._layers_since, self._since = 0, now
        parts = np.split(read, np.cumsum([i.size for i in indices])[:-1])
        return [part.reshape(i.shape).astype(np.int32) for part, i in zip(parts, indices, strict=True)]

    def _bring(self, layer: int, chosen: Integers, *, full: bool) -> None:
        """Take note of a checked choice, and bring in what is missing of it."""
        import mlx.core as mx

        if self._timed:
            self.controller.hit(layer, full)
        experts = list(dict.fromkeys(chosen.reshape(-1).tolist()))
        bank = self._banks[layer]
        bank.policy.use(experts)
        self.on_use(layer, experts)
        if (bank.table[experts] < 0).any():
            if self._unfinished is not None:
                mx.eval(self._unfinished)
                self._unfinished = None
            bank.ensure(experts, experts)
            # Reading from disk takes the same time whatever the width.
            self._since = self.device.now()

    def _table(self, layer: int) -> _Table:
        import mlx.core as mx

        table, held = self._banks[layer].table, self._tables[layer]
        if held is None or not np.array_equal(held.of, table):
            of = np.array(table)
            held = _Table(of, mx.array(np.maximum(of, 0).astype(np.uint32)), bool((of >= 0).all()))
            self._tables[layer] = held
        return held


def install(model: Any, switches: Sequence[Any], banks: Sequence[Slots], device: Device) -> Windows:
    """Let `model` run in windows; its MoE layers are `switches`, in the order they are called, each with its bank.

    Whoever stands in for the switch layers has to ask `Windows.slots`. Tokens that come one at a time are concerned;
    other passes run as they are. Where a switch layer hangs in none of the model's decoder layers every layer is read
    back.
    """
    layers = list(getattr(model, "layers", None) or [])
    owner = {id(module): place for place, layer in enumerate(layers) for module in layer.modules()}
    places = [owner.get(id(switch)) for switch in switches]
    windows = Windows(banks, device, [place or 0 for place in places])
    if None in places:
        windows.reason = "its experts hang in none of its decoder layers"
    else:
        for place, layer in enumerate(layers):
            windows._swap(layer, _windowed_layer, place)
    windows._swap(model, _windowed_model)
    return windows


@memoized
def _windowed_layer(original: Any) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = partial(original.__call__, self)
        windows = self._windows
        return run(*args, **kwargs) if windows is None else windows.call_layer(self._place, run, args, kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


@memoized
def _windowed_model(original: Any) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = partial(original.__call__, self)
        windows = self._windows
        return run(*args, **kwargs) if windows is None else windows.call_model(run, args, kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


def _one_token(args: Any, kwargs: Any) -> bool:
    """Whether a model is called with one token, be it an id or an embedding."""
    import mlx.core as mx

    for value in (kwargs.get("input_embeddings"), *args, *kwargs.values()):
        if isinstance(value, mx.array):
            rows = value.size if mx.issubdtype(value.dtype, mx.integer) else value.size // value.shape[-1]
            return bool(rows == 1)
    return False


def _unrepeatable(arguments: tuple[Any, Any]) -> str:
    """Return why a layer cannot be called again with the same arguments; nothing where it can."""
    import mlx.core as mx

    args, kwargs = arguments
    for leaf in _leaves((*args, *kwargs.values())):
        plain = leaf is None or isinstance(leaf, str | int | float | mx.array)
        if not plain and not is_cache(leaf):
            return f"its layers are handed a {type(leaf).__name__}, which they may have changed"
    return ""


def _caches(arguments: tuple[Any, Any]) -> list[Any]:
    args, kwargs = arguments
    return [leaf for leaf in _leaves((*args, *kwargs.values())) if is_cache(leaf)]


def _arrays(tree: Any) -> list[Any]:
    import mlx.core as mx

    return [leaf for leaf in _leaves(tree) if isinstance(leaf, mx.array)]


def _leaves(tree: Any) -> Iterator[Any]:
    # A model is handed its caches in a list; what else is mutable is a leaf.
    if type(tree) in (list, tuple):
        for item in tree:
            yield from _leaves(item)
    else:
        yield tree


def _mapped(change: Callable[[Any], Any], tree: Any) -> Any:
    """Return an array, or a tuple of such in any depth, with its arrays changed."""
    import mlx.core as mx

    if type(tree) is tuple:
        return tuple(_mapped(change, item) for item in tree)
    return change(tree) if isinstance(tree, mx.array) else tree


def _spoilt(output: Any) -> Any:
    import mlx.core as mx

    return _mapped(lambda array: array * float("nan") if mx.issubdtype(array.dtype, mx.floating) else array, output)


def _same(a: Any, b: Any) -> bool:
    import mlx.core as mx

    pairs = zip(_arrays(a), _arrays(b), strict=True)
    return all(x.shape == y.shape and bool(mx.array_equal(x, y).item()) for x, y in pairs)
