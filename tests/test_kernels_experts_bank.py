"""Experts in the slots of a bank, on a map and on their way from disk: the bits of experts that all lie in memory."""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from instruction_sets import check_on

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from switches import EXPERTS, EXTENSION, FORMATS, HIDDEN, INNER, RANKS, inputs, same_bits, switch  # noqa: E402

HOW = ["4 bits", "8 bits", "mxfp4", "bf16", "f32"]
SHARED = ["none", "plain", "weighed"]
BUFFERS = {"weight": "codes", "scales": "scales", "biases": "biases", "bias": "bias"}


def rows_of(a: Any, experts: Sequence[int]) -> Any:
    """The rows of these experts, in an array of their own."""
    taken = mx.contiguous(a[mx.array(experts)])
    mx.eval(taken)
    return taken


def matrices(layer: Any, experts: Sequence[int] | None = None) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Arrays and options of gate, up and down: all of them, or those of some experts in a bank's slots."""
    found = {}
    for name in ("gate", "up", "down"):
        linear = layer[f"{name}_proj"]
        options = {}
        if "scales" in linear:
            options = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        arrays = {key: linear[key] for key in BUFFERS if key in linear}
        if experts is not None:
            arrays = {key: rows_of(a, experts) for key, a in arrays.items()}
        found[name] = (arrays, options)
    return found


def operation(
    layer: Any, precision: str = "exact", experts: Sequence[int] | None = None, shared: str = "none", mapped: Any = None
) -> Any:
    """The operation over all experts or a bank of some, with a router over all of them."""
    call = EXTENSION.Experts(precision=precision)
    for name, (arrays, options) in matrices(layer, experts).items():
        rest = {key: a for key, a in arrays.items() if key != "weight"}
        call.project(name, arrays["weight"], **rest, **options, in_place=experts is not None)
        if mapped is not None:
            buffers = {BUFFERS[key]: [mapped(name, key, e) for e in range(EXPERTS)] for key in arrays}
            call.append_mapped(name, **buffers)

    def dense(name: str, n: int, k: int, quantized: bool, seed: int) -> None:
        w = mx.random.normal((n, k), key=mx.random.key(seed)) * 0.2
        if quantized:
            call.project(name, *mx.quantize(w, group_size=32, bits=4), group_size=32)
        else:
            call.project(name, w)

    dense("router", EXPERTS, HIDDEN, False, 1)
    call.router(ranks=RANKS, normalize=True)
    if shared != "none":
        dense("shared_gate", 64, HIDDEN, True, 2)
        dense("shared_up", 64, HIDDEN, True, 3)
        dense("shared_down", HIDDEN, 64, True, 4)
    if shared == "weighed":
        dense("shared_weight", 1, HIDDEN, False, 5)
    call.finish()
    return call


ORDER = [4, 2, 0, 5, 1, 3]
SLOTS = mx.array(np.argsort(ORDER).astype(np.uint32))


def check_bits(precisions: Sequence[str] = ("exact", "fast"), rows: Sequence[int] = tuple(range(1, 17))) -> None:
    for how in HOW:
        layer = switch(how=FORMATS[how])
        for precision in precisions:
            for shared in SHARED:
                resident = operation(layer, precision, shared=shared)
                bank = operation(layer, precision, ORDER, shared)
                for m in rows:
                    x = inputs(m, seed=m)[0]
                    indices, weights = bank.route(x)
                    expected = resident.layer(x)
                    assert same_bits(bank.given(x, SLOTS[indices], weights), expected), (how, precision, shared, m)
                x = inputs(40)[0]
                indices, weights = bank.route(x)
                slots = SLOTS[indices]
                assert same_bits(bank(x, slots, weights), resident.routed(x)), (how, precision, shared)
                assert same_bits(bank(x, slots), resident(x, indices)), (how, precision, shared)
                if shared == "none":
                    assert same_bits(bank.given(x, slots, weights), resident.routed(x)), (how, precision)
                else:
                    assert bank.given(x, slots, weights) is None


def test_slots_and_weights_that_are_given_give_the_layer_bit_for_bit() -> None:
    check_bits()


@pytest.mark.parametrize("name", EXTENSION.instruction_sets()[:-1])
def test_every_other_instruction_set_does(name: str) -> None:
    check_on(name, "test_kernels_experts_bank", "check_bits(rows=(1, 7, 16))", "check_arrivals()")


def test_a_bank_of_fewer_slots_than_experts_routes_among_all() -> None:
    layer = switch()
    resident = operation(layer, shared="weighed")
    x = inputs(1)[0]
    chosen, weights = resident.route(x)
    experts = sorted(chosen.tolist()[0])
    bank = operation(layer, experts=experts, shared="weighed")
    assert bank.experts == RANKS
    assert all(same_bits(a, b) for a, b in zip(bank.route(x), (chosen, weights), strict=True))
    slots = mx.array([[experts.index(e) for e in chosen.tolist()[0]]], mx.uint32)
    assert same_bits(bank.given(x, slots, weights), resident.layer(x))
    # The router's indices are not slots, so that what takes them for these is no operation.
    assert bank.layer(x) is None
    assert bank.routed(x) is None


@pytest.mark.parametrize("bias", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [3, 60])
def test_a_slot_is_overwritten_with_its_bias(bias: Any, rows: int) -> None:
    layer = switch(how=FORMATS["4 bits"], bias=True)
    for linear in layer.children().values():
        if "bias" in linear:
            linear.bias = linear.bias.astype(bias)
    mx.eval(layer.parameters())
    parts = {
        name: ({key: mx.contiguous(mx.zeros_like(a)) for key, a in arrays.items()}, options)
        for name, (arrays, options) in matrices(layer).items()
    }
    mx.eval([arrays for arrays, _ in parts.values()])
    call = EXTENSION.Experts()
    for name, (arrays, options) in parts.items():
        call.project(
            name, arrays["weight"], arrays["scales"], arrays["biases"], arrays["bias"], **options, in_place=True
        )
    call.finish()
    for name, (arrays, _) in parts.items():
        for key, a in arrays.items():
            ours, theirs = (v.view(mx.uint16) if v.dtype == mx.bfloat16 else v for v in (a, layer[f"{name}_proj"][key]))
            np.array(ours, copy=False)[:] = np.array(theirs)
    x, indices, weights = inputs(rows)
    assert same_bits(call(x, indices, weights), operation(layer)(x, indices, weights))


def test_a_bank_with_gaps_is_refused() -> None:
    # A copy would never hear of what is read into the bank.
    call = EXTENSION.Experts()
    with pytest.raises(ValueError, match="with gaps"):
        call.project("up", mx.zeros((4, 8, 32))[:, ::2], in_place=True)


class Map:
    """Experts' rows as bytes, each in a buffer of its own."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, name: str, key: str, expert: int) -> memoryview:
        a = self.layer[f"{name}_proj"][key]
        rows = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
        return memoryview(rows[expert].copy()).cast("B")


@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("how", HOW)
def test_experts_behind_the_bank_lie_on_a_map(how: str, rows: int) -> None:
    layer = switch(how=FORMATS[how], bias=how == "4 bits")
    mapped = Map(layer)
    resident = operation(layer)
    both = operation(layer, experts=[3, 1], mapped=mapped)
    assert both.experts == 2 + EXPERTS
    x, indices, weights = inputs(rows)
    # Experts 3 and 1 from the bank, the others from the map; then all from the map.
    table = mx.array([2, 1, 4, 0, 6, 7], mx.uint32)
    expected = resident(x, indices, weights)
    assert same_bits(both(x, table[indices], weights), expected)
    assert same_bits(both(x, indices + 2, weights), expected)
    assert both.layer(x) is None
    full = operation(layer, experts=list(range(EXPERTS)), mapped=mapped)
    assert same_bits(full.routed(x), resident.routed(x))


def test_what_is_appended_must_fit_what_is_there() -> None:
    layer = switch(how=FORMATS["f32"])
    weight = layer.up_proj["weight"]
    size = INNER * HIDDEN * 4
    call = EXTENSION.Experts()
    with pytest.raises(ValueError, match="has 0 experts"):
        call.append_mapped("up", [b"\0" * size])
    call.project("up", weight)
    with pytest.raises(ValueError, match=f"have {size - 4} bytes"):
        call.append_mapped("up", [b"\0" * (size - 4)])
    whole = memoryview(bytearray(size + 64))
    start = next(i for i in range(64) if (np.frombuffer(whole[i:], np.uint8).ctypes.data) % 4 == 1)
    with pytest.raises(ValueError, match="at a multiple of 4"):
        call.append_mapped("up", [whole[start : start + size]])
    with pytest.raises(ValueError, match="scales were given for 1 experts; expected 0"):
        call.append_mapped("up", [bytes(size)], [b"\0"])
    with pytest.raises(ValueError, match="bias were given for 1 experts; expected 0"):
        call.append_mapped("up", [bytes(size)], bias=[b"\0"])
    call.project("gate", layer.gate_proj["weight"])
    call.project("down", layer.down_proj["weight"])
    call.append_mapped("up", [bytes(size)])
    with pytest.raises(ValueError, match="1 of them appended"):
        call.finish()


class Reader:
    """Fills the slots of a bank from threads, in any order, as a store does; `stop` ends it, whatever is missing."""

    def __init__(self, arrivals: Any, slots: Sequence[int], seed: int, delay_s: float = 0.002) -> None:
        self.arrivals, self.delay_s = arrivals, delay_s
        order = list(slots)
        random.Random(seed).shuffle(order)
        self.threads = [threading.Thread(target=self._read, args=(order[i::2],)) for i in range(2)]
        for thread in self.threads:
            thread.start()

    def _read(self, slots: Sequence[int]) -> None:
        for slot in slots:
            time.sleep(self.delay_s)
            self.arrivals.done(slot)

    def stop(self) -> None:
        for thread in self.threads:
            thread.join(60)


def evaluated(result: Any, arrivals: Any, timeout_s: float = 60) -> Any:
    """Evaluate, and end waiting in vain by an error rather than never."""
    timer = threading.Timer(timeout_s, arrivals.abort)
    timer.start()
    mx.eval(result)
    timer.cancel()
    assert not arrivals.aborted
    return result


def check_arrivals(rows: Sequence[int] = (1, 9, 16, 60)) -> None:
    layer = switch()
    arrivals = EXTENSION.Arrivals(EXPERTS)
    for precision in ("exact", "fast"):
        for shared in ("none", "weighed"):
            call = operation(layer, precision, ORDER, shared)
            for m in rows:
                x, slots, weights = inputs(m, seed=m)
                calls = [partial(call, x, slots, weights), partial(call, x, slots, None)]
                calls += [partial(call.given, x, slots, weights)] if m <= 16 else []
                for n, made in enumerate(calls):
                    expected = made(None)
                    missing = random.Random(m + n).sample(range(EXPERTS), 1 + (m + n) % EXPERTS)
                    arrivals.expect(missing)
                    result = made(arrivals)
                    reader = Reader(arrivals, missing, m)
                    assert same_bits(evaluated(result, arrivals), expected), (precision, shared, m, n)
                    reader.stop()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_order_of_arrival_does_not_show(threads: int) -> None:
    before = EXTENSION.threads()
    EXTENSION.set_threads(threads)
    try:
        check_arrivals()
    finally:
        EXTENSION.set_threads(before)


def test_what_has_come_is_computed_before_what_has_not() -> None:
    """Slots that had arrived are spoiled while the operation waits for another, which is not written before that."""
    layer = switch()
    parts = matrices(layer, ORDER)
    call = EXTENSION.Experts()
    for name, (arrays, options) in parts.items():
        call.project(name, arrays["weight"], arrays["scales"], arrays["biases"], **options, in_place=True)
    call.finish()
    x, indices, weights = inputs(2)
    slots, arrivals = SLOTS[indices], EXTENSION.Arrivals(EXPERTS)
    expected = call(x, slots, weights)
    mx.eval(expected)
    missing = int(slots[0, 0].item())
    writable = np.array(parts["down"][0]["scales"], copy=False)
    kept = writable[missing].copy()
    writable[missing] = 0
    arrivals.expect([missing])

    def read() -> None:
        time.sleep(0.5)
        writable[:] = 0
        writable[missing] = kept
        arrivals.done(missing)

    reader = threading.Thread(target=read)
    reader.start()
    assert same_bits(evaluated(call(x, slots, weights, arrivals), arrivals), expected)
    reader.join(60)
    assert arrivals.waited_s >= 0.1


def test_waiting_takes_no_processor_time() -> None:
    call, arrivals = operation(switch()), EXTENSION.Arrivals(EXPERTS)
    x, slots, weights = inputs(1)
    arrivals.expect(list(range(EXPERTS)))
    before = time.process_time()
    reader = Reader(arrivals, range(EXPERTS), 1, delay_s=0.1)
    evaluated(call(x, slots, weights, arrivals), arrivals)
    reader.stop()
    assert time.process_time() - before <= 0.1


@pytest.mark.parametrize("rows", [1, 60])
def test_a_slot_that_failed_makes_the_result_nan_and_nothing_else(rows: int) -> None:
    call, arrivals = operation(switch(), shared="plain"), EXTENSION.Arrivals(EXPERTS)
    x, slots, weights = inputs(rows)
    bad, slow = (int(s) for s in slots[0, :2].tolist())
    for made in (call, call) if rows > 16 else (call, call.given):
        expected = made(x, slots, weights)
        arrivals.expect([bad, slow])
        threading.Timer(0.02, arrivals.fail, [bad]).start()
        # Nobody waits for the other one any more.
        result = evaluated(made(x, slots, weights, arrivals=arrivals), arrivals)
        assert mx.all(mx.isnan(result)).item()
        assert arrivals.failed() == [bad]
        ranks = evaluated(call(x, slots, arrivals=arrivals), arrivals)
        assert mx.all(mx.isnan(ranks)).item()
        arrivals.reset()
        assert arrivals.failed() == []
        assert same_bits(made(x, slots, weights, arrivals=arrivals), expected)


def test_an_operation_that_waits_can_be_aborted() -> None:
    call, arrivals = operation(switch()), EXTENSION.Arrivals(EXPERTS)
    x, slots, weights = inputs(2)
    arrivals.expect([int(slots[0, 0].item())])
    threading.Timer(0.05, arrivals.abort).start()
    began = time.monotonic()
    result = call(x, slots, weights, arrivals)
    mx.eval(result)
    assert mx.all(mx.isnan(result)).item()
    assert arrivals.aborted
    # Until reset, none waits.
    again = call(x, slots, weights, arrivals)
    mx.eval(again)
    assert mx.all(mx.isnan(again)).item()
    assert time.monotonic() - began < 30
    arrivals.reset()
    assert not arrivals.aborted
    assert same_bits(call(x, slots, weights, arrivals), call(x, slots, weights))


def test_nobody_waits_for_arrivals_that_nobody_can_report() -> None:
    call, arrivals = operation(switch()), EXTENSION.Arrivals(EXPERTS)
    x, slots, weights = inputs(2)
    arrivals.expect(list(range(EXPERTS)))
    result = call(x, slots, weights, arrivals)
    mx.async_eval(result)
    del arrivals
    gc.collect()
    mx.eval(result)
    assert mx.all(mx.isnan(result)).item()


def test_arrivals_know_their_slots() -> None:
    with pytest.raises(ValueError, match="0 slots"):
        EXTENSION.Arrivals(0)
    arrivals = EXTENSION.Arrivals(3)
    for call in (arrivals.done, arrivals.fail, lambda slot: arrivals.expect([slot])):
        for slot in (-1, 3):
            with pytest.raises(ValueError, match=f"slot {slot} where there are 3"):
                call(slot)
