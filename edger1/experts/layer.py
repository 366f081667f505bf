"""What stands in for a layer's routed experts: it reads the router's choice back, brings in what is missing, computes.

Up to 16 rows (decoding, batches, drafts): the experts that are there are computed while the others are being read;
where they are more than there are slots, a few are computed while the next ones are read.
More rows (prefill): expert by expert, each read at most once, a group computed while the next is read; a chunk of 512
tokens asks for nearly all experts, whatever the number of slots.

Either way each row's result is computed by itself and the results are put in the order of ranks before anyone sums
them: what comes out does not depend on what was where. For up to 16 rows it has the bits of the resident layer.

On CPUs with kernels the module that routes is one operation (`edger1.kernels.experts_streamed`), and waits itself for
what is being read. Without, mlx-lm's own code runs over the bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edger1.experts.bank import Bank
from edger1.experts.figures import BYTES_READ, CALLS, GUESSES, HITS, MISSES, ON_MAP, STALL_S

if TYPE_CHECKING:
    from edger1.experts.store import Read
    from edger1.experts.streaming import Streaming
    from edger1.kernels.experts_streamed import StreamedOperation

FEW_ROWS = 16
"""Rows that the kernels compute to the bits that each has alone."""

_COPY_EVERY = 4
"""Of so many uses of experts on the map, one brings its expert into a slot."""

Compute = Callable[[Any, Any, Any], Any]
"""(switch layer, x [..., hidden], slots [..., ranks]) -> what each expert gives, [..., ranks, hidden]."""
Experts = npt.NDArray[np.int64]
"""Numbers of experts, [..., ranks]."""


class StreamedExperts:
    """The experts of one layer, out of its bank."""

    def __init__(self, bank: Bank, streaming: Streaming) -> None:
        self.bank = bank
        self.figures = streaming.figures[bank.layer.index]
        self.operation: StreamedOperation | None = None
        self.held_by: Any = None
        """The switch layer whose arrays the operation reads."""
        self.mapped = False
        """Whether slots behind the bank's are the experts on the map of their files."""
        self._on_map = 0
        bank.wait = self._wait  # type: ignore[method-assign]
        bank.check = streaming.check
        self._streaming = streaming

    def switch(self, switch: Any, x: Any, indices: Any, compute: Compute) -> Any:
        """Return what the experts `indices` [..., ranks] of a switch layer give for x [..., hidden].

        Raises StreamError where an expert cannot be read.
        """
        if self._streaming.asleep:
            import mlx.core as mx

            return mx.zeros((*indices.shape, x.shape[-1]), dtype=x.dtype)
        compute = self._ranks_or(compute)
        bank = self.bank
        if bank.identity:
            return compute(switch, x, indices)
        windows = self._streaming.windows
        slots = windows.slots(bank.layer.index, indices) if windows is not None else None
        if slots is not None:
            return compute(switch, x, slots)
        chosen = self._read_back(indices)
        distinct = _distinct(chosen)
        missing = self._use(distinct)
        if not missing:
            return compute(switch, x, _array(bank.table[chosen]))
        if len(distinct) > bank.usable_slots or chosen.size > FEW_ROWS * chosen.shape[-1]:
            return self._by_expert(switch, x, chosen, distinct, compute)
        return self._by_row(switch, x, chosen, distinct, missing, compute)

    def module(self, owner: Any, x: Any) -> Any:
        """Return what a module that routes and holds the experts answers to x [..., hidden] as one operation.

        None where it is not one, or for a call that goes expert by expert. Raises as `switch`.
        """
        operation, bank = self.operation, self.bank
        if operation is None or not operation.has_router or self._streaming.asleep:
            return None
        if not operation.stands(owner, self.held_by):
            self.operation = None
            return None
        routed = operation.route(x)
        if routed is None:
            return None
        indices, weights = routed
        if bank.identity:
            return operation.given(x, indices, weights)
        if indices.size > FEW_ROWS * indices.shape[-1]:
            return None
        following = self._streaming.following(bank.layer.index)
        early = following.route_early(x) if following is not None else None
        if following is None or early is None:
            chosen = self._read_back(indices)
        else:
            chosen, guesses = self._read_back(indices, early)
            following.guess(_distinct(guesses))
        distinct = _distinct(chosen)
        if len(distinct) > bank.usable_slots:
            return self._in_turns(operation, x, chosen, distinct, weights)
        missing = self._use(distinct)
        if not missing:
            return operation.given(x, _array(bank.table[chosen]), weights)
        on_map = self._find_on_map(missing, distinct)
        reads = self._request([expert for expert in missing if expert not in on_map], distinct)
        slots = bank.places[chosen]
        for expert in on_map:
            slots[chosen == expert] = bank.slots + expert
        if (slots < 0).any():
            # A read has failed already, and its slot is free again.
            self._wait(reads)
        with self._waiting():
            done = operation.given(x, _array(slots), weights, bank.arrivals)
            if done is None:
                return None
            self._streaming.device.begin(done)
            self._wait(reads)
        return done

    def route_early(self, x: Any) -> Any:
        """Return which experts the router would choose for the input of the layer before, or None."""
        operation = self.operation
        if operation is None or not operation.has_router or self.bank.identity:
            return None
        routed = operation.route(x)
        return None if routed is None else routed[0]

    def guess(self, experts: Sequence[int], keep: Collection[int] = ()) -> None:
        """Begin to read those of `experts` that are not there, behind all that somebody waits for."""
        bank = self.bank
        bank.settle()
        keep = {*experts, *keep}
        for expert in experts:
            if bank.places[expert] >= 0:
                continue
            if bank.request(expert, keep, guessed=True) is None:
                return
            self.figures[GUESSES] += 1
            self.figures[BYTES_READ] += bank.layer.expert_bytes

    def _ranks_or(self, compute: Compute) -> Compute:
        operation = self.operation
        if operation is None:
            return compute

        def ranks(switch: Any, x: Any, slots: Any) -> Any:
            found = operation.ranks(x, slots)
            return compute(switch, x, slots) if found is None else found

        return ranks

    def _read_back(self, *indices: Any) -> Any:
        """Wait for the router's choice, and for all that was asked of MLX before it."""
        found = self._streaming.device.read_back(*indices)
        chosen = [each.astype(np.int64) for each in (found if len(indices) > 1 else [found])]
        self._streaming.let_go()
        self._streaming.check()
        self.bank.settle()
        return chosen if len(chosen) > 1 else chosen[0]

    def _use(self, distinct: Sequence[int]) -> list[int]:
        """Tell the policy, and whoever counts, which experts a call uses; returns those that are not there."""
        self.bank.policy.use(distinct)
        missing = self.count(distinct)
        self.bank.give_up_guesses(distinct)
        return missing

    def count(self, distinct: Sequence[int]) -> list[int]:
        """Note that a call uses these experts; returns those that are not there."""
        bank, figures = self.bank, self.figures
        missing = [expert for expert in distinct if bank.table[expert] < 0]
        self._streaming.used(bank.layer.index, distinct)
        figures[CALLS] += 1
        figures[HITS] += len(distinct) - len(missing)
        figures[MISSES] += len(missing)
        return missing

    def _request(self, missing: Sequence[int], distinct: Sequence[int]) -> list[Read]:
        """Begin to read what is missing, into slots that nothing reads any more."""
        self._streaming.device.finish()
        reads: list[Read] = []
        keep = {*distinct, *missing}
        for expert in missing:
            self.bank.settle()
            if self.bank.table[expert] >= 0:
                # A guess that has come since the layer looked.
                continue
            if self.bank.places[expert] < 0:
                self.figures[BYTES_READ] += self.bank.layer.expert_bytes
            while (read := self.bank.request(expert, keep)) is None:
                self.bank.make_way(keep, reads, self._streaming.patience_s)
            reads.append(read)
        return reads

    def _find_on_map(self, missing: Sequence[int], distinct: Sequence[int]) -> set[int]:
        """Return those of `missing` that are computed where they lie, since the page cache has them.

        That is cheaper than a copy for one use, and dearer for many: now and then one is copied into a slot as well.
        """
        if not self.mapped:
            return set()
        bank, store = self.bank, self._streaming.store
        found = {e for e in missing if bank.places[e] < 0 and store.holds(bank.layer, e)}
        keep = {*distinct}
        for expert in found:
            self._on_map += 1
            if self._on_map % _COPY_EVERY == 0 or bank.has_free_slots:
                self.guess([expert], keep)
        self.figures[ON_MAP] += len(found)
        self._streaming.let_go_later(bank.layer, found)
        return found

    def _wait(self, reads: Sequence[Read]) -> None:
        """Wait until all are there; raises what the first failed of, or what `Streaming.check` raises meanwhile."""
        for read in reads:
            while not read.wait(self._streaming.patience_s):
                self._streaming.check()
        self.bank.settle()
        for read in reads:
            if read.error is not None:
                raise read.error

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count the time inside as lost to reads, or, where an operation waits by itself, what it waited.

        Whatever ends it early releases that operation.
        """
        began = time.perf_counter()
        arrivals = self.bank.arrivals
        before = arrivals.waited_s if arrivals is not None else 0.0
        try:
            yield
        except BaseException:
            if arrivals is not None:
                arrivals.abort()
                # What was aborted has let go of its slots when this returns.
                self._streaming.device.finish()
                self.bank.forget_arrivals()
            raise
        finally:
            waited = arrivals.waited_s - before if arrivals is not None else time.perf_counter() - began
            self.figures[STALL_S] += waited

    def _by_row(
        self, switch: Any, x: Any, chosen: Experts, distinct: Sequence[int], missing: Sequence[int], compute: Compute
    ) -> Any:
        reads = self._request(missing, distinct)
        pairs = chosen.ravel()
        here = np.flatnonzero(self.bank.table[pairs] >= 0)
        there = np.flatnonzero(self.bank.table[pairs] < 0)
        rows = x.reshape(-1, x.shape[-1])
        ranks = chosen.shape[-1]
        parts = []
        if here.size:
            parts.append(self._pairs(switch, rows, pairs, here, ranks, compute))
        began = time.perf_counter()
        try:
            self._wait(reads)
        finally:
            self.figures[STALL_S] += time.perf_counter() - began
        parts.append(self._pairs(switch, rows, pairs, there, ranks, compute))
        return _in_order(parts, [here, there] if here.size else [there], chosen.shape)

    def _pairs(self, switch: Any, rows: Any, pairs: Experts, some: Any, ranks: int, compute: Compute) -> Any:
        """Return what the experts of some pairs of row and rank give, [pairs, hidden], with its computation begun."""
        slots = _array(self.bank.table[pairs[some]][:, None])
        found = compute(switch, rows[_array(some // ranks)], slots)[:, 0, :]
        self._streaming.device.begin(found)
        return found

    def _by_expert(self, switch: Any, x: Any, chosen: Experts, distinct: Sequence[int], compute: Compute) -> Any:
        """Compute expert by expert: those that are there first, then group after group of those that are not."""
        bank = self.bank
        rows = x.reshape(-1, x.shape[-1])
        ranks = chosen.shape[-1]
        pairs = chosen.ravel()
        # Pairs of one expert side by side, in the order of rows.
        order = np.argsort(pairs, kind="stable")
        begins = np.searchsorted(pairs[order], np.arange(bank.layer.experts + 1))
        group = [expert for expert in distinct if bank.table[expert] >= 0]
        missing = [expert for expert in distinct if bank.table[expert] < 0]
        parts, places = [], []
        reads: list[Read] = []
        while group or missing:
            # What is computed next must stay; what was computed, or is not asked for, may go.
            batch = missing[: self._room(group)]
            reads = self._request(batch, group) if batch else []
            missing = missing[len(batch) :]
            if group:
                some = np.concatenate([order[begins[expert] : begins[expert + 1]] for expert in sorted(group)])
                parts.append(self._pairs(switch, rows, pairs, some, ranks, compute))
                places.append(some)
                self._streaming.device.wait_for(parts[-1])
            began = time.perf_counter()
            try:
                self._wait(reads)
            finally:
                self.figures[STALL_S] += time.perf_counter() - began
            group = batch
        return _in_order(parts, places, chosen.shape)

    def _in_turns(
        self, operation: StreamedOperation, x: Any, chosen: Experts, distinct: Sequence[int], weights: Any
    ) -> Any:
        """Compute few rows whose experts do not have slots all at once; the bits are those of having them.

        Each is computed as soon as it is there, which takes far less time than reading one: all slots but those that
        are being computed are being filled.
        """
        bank, rows, pairs, top_k = self.bank, x.reshape(-1, x.shape[-1]), chosen.ravel(), chosen.shape[-1]
        of = {expert: np.flatnonzero(pairs == expert) for expert in distinct}
        missing = self._use(distinct)
        group = [expert for expert in distinct if bank.table[expert] >= 0]
        # Without a read those that had come before they were asked for.
        coming: dict[int, Read | None] = {}
        parts: list[Any] = []
        places = []
        while group or coming or missing:
            batch = missing[: max(0, bank.usable_slots - len(group) - len(coming))]
            if batch:
                coming |= dict.fromkeys(batch)
                coming |= {read.expert: read for read in self._request(batch, [*group, *coming])}
                missing = missing[len(batch) :]
            if group:
                some = np.concatenate([of[expert] for expert in group])
                parts.append(operation.ranks(rows[_array(some // top_k)], _array(bank.table[pairs[some]][:, None])))
                places.append(some)
                self._streaming.device.wait_for(parts[-1])
            else:
                began = time.perf_counter()
                try:
                    self._wait([read for read in coming.values() if read is not None][:1])
                finally:
                    self.figures[STALL_S] += time.perf_counter() - began
            bank.settle()
            group = [expert for expert in coming if bank.table[expert] >= 0]
            coming = {expert: read for expert, read in coming.items() if expert not in group}
        ranks = _in_order([part[:, 0, :] for part in parts], places, chosen.shape)
        return operation.summed(x, ranks, weights)

    def _room(self, group: Sequence[int]) -> int:
        """How many experts may be read while `group` is computed: as many are to be free the next time."""
        usable = self.bank.usable_slots
        half = max(1, usable // 2)
        return min(usable - len(group), half) if group else half


def _distinct(chosen: Experts) -> list[int]:
    return list(dict.fromkeys(chosen.ravel().tolist()))


def _array(values: Any) -> Any:
    import mlx.core as mx

    return mx.array(np.ascontiguousarray(values, np.uint32))


def _in_order(parts: list[Any], places: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """Put results [pairs, hidden] where their pairs stand in `shape` [..., ranks]; returns [..., ranks, hidden]."""
    import mlx.core as mx

    order = np.empty(sum(place.size for place in places), np.int64)
    order[np.concatenate(places)] = np.arange(order.size)
    whole = parts[0] if len(parts) == 1 else mx.concatenate(parts)
    parts.clear()
    return whole[_array(order)].reshape(*shape, whole.shape[-1])


@cache
def streamed_switch(original: Any) -> Any:
    """Return a subclass of a switch layer's class whose objects compute out of the bank in their `_streamed`."""
    compute = original.__call__

    def call(self: Any, x: Any, indices: Any) -> Any:
        held: StreamedExperts | None = vars(self).get("_streamed")
        return compute(self, x, indices) if held is None else held.switch(self, x, indices, compute)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})


@cache
def streamed_module(original: Any) -> Any:
    """Return a subclass of a module's class whose objects run as the operation of their `_streamed` where they can."""
    call_original = original.__call__

    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        held: StreamedExperts | None = vars(self).get("_streamed")
        if held is not None and not args and not kwargs:
            done = held.module(self, x)
            if done is not None:
                return done
        return call_original(self, x, *args, **kwargs)

    return type(original.__name__, (original,), {"__call__": call, "__module__": original.__module__})
