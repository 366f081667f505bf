"""A model whose routed experts are streamed: the store, the banks, and what stands in for each layer's experts."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edger1.experts import anatomy
from edger1.experts.anatomy import LayerExperts
from edger1.experts.bank import PATIENCE_S, Bank
from edger1.experts.budget import least_slots
from edger1.experts.device import Device, MLXDevice
from edger1.experts.figures import BYTES_READ, COMPUTE_S, STALL_S, empty
from edger1.experts.layer import StreamedExperts, streamed_module, streamed_switch
from edger1.experts.miss_cost import MissCosts
from edger1.experts.policy import DEFAULT_POLICY, POLICIES, Policy
from edger1.experts.popularity import Popularity
from edger1.experts.prefetch import Trial
from edger1.experts.pressure import Pressure, adjust, free_bytes
from edger1.experts.store import Store

if TYPE_CHECKING:
    from edger1.experts.windows import Windows
    from edger1.kernels.experts_fit import Fit
    from edger1.kernels.experts_streamed import Mapped, StreamedOperation
    from edger1.kernels.install import Installed


class Streaming:
    """The streamed experts of one model. Everything but the reads happens on the thread that owns MLX.

    `slots` is the number of slots of each layer.
    """

    patience_s = PATIENCE_S
    """How long it waits for a read before it looks whether anyone still wants it."""

    def __init__(
        self,
        layers: Sequence[LayerExperts],
        slots: Sequence[int],
        *,
        policy: Callable[[int], Policy] = POLICIES[DEFAULT_POLICY],
        popularity: Popularity | None = None,
        miss_costs: MissCosts | None = None,
        mode: str = "auto",
        device: Device | None = None,
        in_turns: bool = False,
    ) -> None:
        self.store = Store(layers, mode=mode)
        self._in_turns = in_turns
        self.device: Device = device or MLXDevice()
        self.banks = [
            Bank(layer, count, self.store, policy(layer.experts)) for layer, count in zip(layers, slots, strict=True)
        ]
        self.figures = empty(len(self.banks))
        """See `edger1.experts.figures.COLUMNS`; since loading."""
        self.layers = [StreamedExperts(bank, self) for bank in self.banks]
        self._popularity = popularity
        self.miss_costs = miss_costs
        self.windows: Windows | None = None
        """Lets layers go on without waiting for their routers, on devices where waiting costs more than a layer."""
        self.asleep = False
        """Whether switch layers answer zeros and read nothing, while others try the model out."""
        self.interrupted: Callable[[], None] | None = None
        """Called while it waits; raises where nobody wants the answer any more."""
        self.prefetch = Trial()
        self.pressure = Pressure(
            self.nbytes,
            sum(least_slots(layer, in_turns=in_turns) * layer.expert_bytes for layer in layers),
            max((layer.expert_bytes for layer in layers), default=0),
        )
        self._most_bytes = self.nbytes
        self.store.look_for_plenty(free_bytes())
        self._at = time.perf_counter()
        self._stalled = 0.0
        self._attached: list[tuple[Any, type]] = []
        # Experts that were computed, or are about to be, on the map of their files.
        self._touched: list[tuple[LayerExperts, int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes that the slots hold."""
        return sum(bank.nbytes for bank in self.banks)

    @property
    def given_back_bytes(self) -> int:
        """Bytes of the banks' arrays whose memory the system has."""
        return sum(bank.slots * bank.layer.expert_bytes for bank in self.banks) - self.nbytes

    @property
    def complete(self) -> bool:
        """Whether every expert has its slot, so that nothing is ever read while the model runs."""
        return all(bank.identity for bank in self.banks)

    def attach(self, model: Any) -> None:
        """Put the banks in the places of the model's stacked experts, which need not have been read."""
        switches = dict(anatomy.switches(model))
        for held in self.layers:
            switch = switches[held.bank.layer.path]
            held.held_by = switch
            linears = dict(anatomy.projections(switch))
            for (projection, name), array in held.bank.arrays.items():
                linears[projection][name] = array
            kind: Any = type(switch)
            self._take_over(switch, streamed_switch(kind), held)

    def fuse(self, model: Any, installed: Installed) -> None:
        """Let modules with experts run as operations of the kernels, where those are in place and cover them.

        What came of it is told by `installed`, what `edger1.kernels.install.install` did to the model.
        """
        from edger1.kernels import extension
        from edger1.kernels.experts_fit import Fit, UnfitError

        kernels = extension()
        if kernels is None or not installed.active:
            return
        fit, experts = Fit(installed.precision, kernels), installed.experts
        held_by = {id(switch): vars(switch)["_streamed"] for switch, _ in self._attached}
        for owner in list(model.modules()):
            for switch in owner.children().values():
                held: StreamedExperts | None = held_by.get(id(switch))
                if held is None:
                    continue
                maps = self.store.maps(held.bank.layer, kernels)
                try:
                    operation = _operation(owner, switch, fit, held.bank.layer.experts, maps)
                except UnfitError as error:
                    reason = f"{type(owner).__name__}: {error}"
                    experts.others[reason] = experts.others.get(reason, 0) + 1
                    continue
                held.operation = operation
                held.mapped = operation.mapped
                held.bank.arrivals = kernels.Arrivals(held.bank.slots)
                owner_kind: Any = type(owner)
                counts = experts.layers if operation.has_router else experts.experts
                counts[owner_kind.__name__] = counts.get(owner_kind.__name__, 0) + 1
                if operation.has_router:
                    self._take_over(owner, streamed_module(owner_kind), held)

    def open_windows(self, model: Any) -> None:
        """Let the layers of `model`, to which this is attached, run in optimistic windows from here on."""
        from edger1.experts.windows import install

        switches = [held.held_by for held in self.layers]
        opened = install(model, switches, self.banks, self.device)
        opened.on_use = self._count_use  # type: ignore[method-assign]
        self.windows = opened

    def _count_use(self, layer: int, experts: Sequence[int]) -> None:
        held = self.layers[layer]
        missing = held.count(experts)
        held.figures[BYTES_READ] += len(missing) * held.bank.layer.expert_bytes

    def _take_over(self, module: Any, replacement: type, held: StreamedExperts) -> None:
        self._attached.append((module, type(module)))
        object.__setattr__(module, "_streamed", held)
        module.__class__ = replacement

    @contextlib.contextmanager
    def sleeping(self) -> Iterator[None]:
        """Let switch layers answer zeros inside."""
        self.asleep = True
        try:
            yield
        finally:
            self.asleep = False

    def fill(self) -> Generator[int, None, None]:
        """Fill the banks that have a slot for each expert; yields the bytes that came."""
        for bank in self.banks:
            if bank.slots < bank.layer.experts:
                continue
            for read in bank.load_all():
                while not read.wait(self.patience_s):
                    # Whoever loads may be told to stop.
                    yield 0
                if read.error is not None:
                    raise read.error
                yield bank.layer.expert_bytes
            bank.settle()

    def warm(self) -> None:
        """Begin to read what was popular in earlier runs into free slots, behind all that is asked for meanwhile."""
        if self._popularity is None or not self._popularity.known:
            return
        for bank in self.banks:
            if bank.slots >= bank.layer.experts:
                continue
            counts = self._popularity.counts(bank.layer.index)
            bank.policy.warm(counts.tolist())
            for expert in np.argsort(-counts, kind="stable")[: bank.slots].tolist():
                if counts[expert] > 0:
                    bank.request(expert, (), guessed=True, lasting=True)

    def let_go_later(self, layer: LayerExperts, experts: Collection[int]) -> None:
        """Note experts that are about to be computed on the map of their files."""
        self._touched += [(layer, expert) for expert in experts]

    def let_go(self) -> None:
        """Stop counting what was computed on maps as this process's memory; MLX has finished with it.

        Raises StreamError where a file was cut short meanwhile.
        """
        if not self._touched:
            return
        touched, self._touched = self._touched, []
        self.store.check_maps()
        for layer, expert in touched:
            self.store.let_go(layer, expert)

    def check(self) -> None:
        """Raise where the request under way is not wanted any more."""
        if self.interrupted is not None:
            self.interrupted()

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """Count the experts that a call of a layer uses, and the time since the call before."""
        if self._popularity is not None:
            self._popularity.add(layer, experts)
        now = time.perf_counter()
        stalled = float(self.figures[:, STALL_S].sum())
        self.figures[layer, COMPUTE_S] += now - self._at - (stalled - self._stalled)
        self._at, self._stalled = now, stalled

    def uses(self) -> list[list[int]]:
        """Return how often each expert of each layer was used since loading; nothing where nobody counts."""
        return [[] for _ in self.banks] if self._popularity is None else self._popularity.uses()

    def following(self, layer: int) -> StreamedExperts | None:
        """Return the layer after one, if its experts are to be read ahead."""
        return self.layers[layer + 1] if self.prefetch.on and layer + 1 < len(self.layers) else None

    def allow(self, nbytes: int) -> None:
        """Let the banks hold `nbytes` at most from here on, and give back what is above that.

        Called between the steps of a model, before anyone takes what is given back.
        """
        allowed = max(nbytes, self.pressure.least_bytes)
        self.pressure.planned_bytes = min(allowed, self._most_bytes)
        if self.nbytes > allowed:
            self.device.finish()
            adjust(self.banks, allowed - self.nbytes, in_turns=self._in_turns)

    def breathe(self) -> int:
        """Let banks give memory back where other programs need it, or take it again; returns the change in bytes.

        For between the steps of a model. It looks once a second at most.
        """
        change = self.pressure.change_bytes(self.nbytes)
        if change == 0:
            return 0
        self.device.finish()
        return adjust(self.banks, change, in_turns=self._in_turns)

    def begin(self) -> float:
        """Begin a step: what its banks hold is decided, and time counted from here on; what was before is nobody's."""
        self.breathe()
        self._at, self._stalled = time.perf_counter(), float(self.figures[:, STALL_S].sum())
        return self._at

    def close(self) -> None:
        """Save what was learnt of the experts, end the reads and give the model's layers their classes back."""
        if self._popularity is not None:
            self._popularity.save()
        if self.miss_costs is not None:
            self.miss_costs.save()
        if self.windows is not None:
            self.windows.uninstall()
            self.windows = None
        for switch, original in reversed(self._attached):
            switch.__class__ = original
            vars(switch).pop("_streamed", None)
        self._attached = []
        self.store.close()


def _operation(owner: Any, switch: Any, fit: Fit, experts: int, maps: Mapped | None) -> StreamedOperation:
    """Return the operation of a module with streamed experts, on the maps of their files as well where those serve."""
    from edger1.kernels.experts_streamed import streamed

    if maps is not None:
        # What lies in a file need not be aligned as the processor wants it.
        with contextlib.suppress(ValueError):
            return streamed(owner, switch, fit, experts=experts, mapped=maps)
    return streamed(owner, switch, fit, experts=experts)
