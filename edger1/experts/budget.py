"""How many expert slots each layer gets under a memory ceiling, and what may be expected of them: plain arithmetic.

What the ceiling leaves beside everything that is not an expert is one byte budget for all layers. It is spent slot by
slot: the next one goes to the layer where it saves most a byte, which is how often the layer's next most popular expert
is asked for, times what a miss costs there, over the expert's size. Since popularity falls with each further expert,
that is the best division there is (but for the last slots, which may not fit).

What to expect follows from the independent reference model: every token draws experts by popularity, whatever it drew
before, and the bank holds the most popular ones. Real routing repeats itself from token to token, so that a bank which
follows it hits more often.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

from edger1.errors import UsageError
from edger1.experts.anatomy import LayerExperts
from edger1.experts.store import THREADS, read_buffer_bytes
from edger1.memory import Plan

LEAST_SLOTS = 2
"""One expert of a layer is computed while another is read."""
_PAGE = 4096
# A bank's array begins at a page of its own, which takes a page more than its values; so does its end.
_ARRAY_SLACK = 2 * _PAGE

Popularity = Sequence[Sequence[float]]
"""For each layer how often each of its experts was used; any unit, and an empty layer is one that is not known."""


@dataclass(frozen=True)
class StreamPlan:
    """The banks of a model, a value a layer, and what they take.

    `lent_slots` are how many there are while the context is empty: the KV cache's memory is lent to the banks until it
    is asked for. `bank_bytes` are all `slots` together, `staging_bytes` what reading and prefill hold beside them,
    `least_bank_bytes` the banks at the fewest slots that work. `hit_rates` are the expected shares of a layer's
    requests that find their expert in a slot, `hit_rate` that of all layers; `known` says whether they come from saved
    popularity, and not from every expert being used alike.
    """

    slots: tuple[int, ...]
    lent_slots: tuple[int, ...]
    experts: tuple[int, ...]
    top_k: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    bank_bytes: int
    least_bank_bytes: int
    staging_bytes: int
    hit_rates: tuple[float, ...]
    hit_rate: float
    known: bool
    by_hand: bool

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StreamPlan:
        """Read what `dataclasses.asdict` wrote, whose tuples may have become lists."""
        read: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**read)


@dataclass(frozen=True)
class Prediction:
    """Tokens a second that reading weights allows, and the rates that this was worked out with."""

    tokens_per_s: float
    weight_bytes_per_s: float
    disk_bytes_per_s: float | None = None


def parse_slots(asked: str | int) -> int | float:
    """Read `expert_slots`: a number of slots a layer, or a share such as "25%", which is returned as a float.

    Raises UsageError for anything else, for zero, and for more than 100%.
    """
    match = None if isinstance(asked, bool) else re.fullmatch(r"\s*(\d{1,9}|\d{1,9}(?:\.\d{1,9})?(%))\s*", str(asked))
    if match is None:
        raise UsageError(f'expert_slots is {asked!r}; expected a number of slots a layer, or a share such as "25%".')
    share = match[2] is not None
    value: int | float = float(match[1].rstrip("%")) / 100 if share else int(match[1])
    if value <= 0 or (share and value > 1):
        raise UsageError(f"expert_slots is {asked!r}; expected 1 or more slots a layer, or more than 0% up to 100%.")
    return value


def least_slots(layer: LayerExperts, *, in_turns: bool = False) -> int:
    """Return the fewest slots that a layer is given: all experts of one token have theirs at once, or take turns."""
    return min(layer.experts, LEAST_SLOTS if in_turns else max(layer.top_k, LEAST_SLOTS))


def slots_by_hand(layers: Sequence[LayerExperts], asked: str | int) -> tuple[int, ...]:
    """Return the slots a layer that `expert_slots` asks for: no more than there are experts; a share is rounded up.

    A share below what a layer needs becomes that. Raises UsageError for a number below it, and as `parse_slots`.
    """
    value = parse_slots(asked)
    if isinstance(value, float):
        return tuple(min(layer.experts, max(least_slots(layer), -int(-layer.experts * value // 1))) for layer in layers)
    least = max((least_slots(layer) for layer in layers), default=0)
    if value < least:
        raise UsageError(
            f"expert_slots is {asked}, but each token asks for {max(layer.top_k for layer in layers)} experts a layer: "
            f"expected {least} or more, or a share such as 25%."
        )
    return tuple(min(layer.experts, value) for layer in layers)


def shares(layers: Sequence[LayerExperts], popularity: Popularity | None) -> list[list[float]]:
    """Return each layer's experts' shares of its requests, the most popular first.

    One use is added to each, so that an expert which was never seen counts as rare and not as impossible. Where nothing
    is known, all are alike.
    """
    found = []
    for i, layer in enumerate(layers):
        counts = popularity[i] if popularity is not None and i < len(popularity) else ()
        known = [max(0.0, float(count)) for count in counts] if len(counts) == layer.experts else [0.0] * layer.experts
        total = sum(known) + layer.experts
        found.append(sorted(((count + 1) / total for count in known), reverse=True))
    return found


def slot_bytes(layer: LayerExperts, slots: int) -> int:
    """Return what a bank of `slots` slots takes."""
    return slots * layer.expert_bytes + len(layer.parts) * _ARRAY_SLACK


def allocate(
    layers: Sequence[LayerExperts],
    budget_bytes: int,
    ranked: Sequence[Sequence[float]],
    miss_cost_s: Sequence[float] | None = None,
    *,
    in_turns: bool = False,
) -> tuple[int, ...]:
    """Spend the budget on slots, each where it saves most a byte; every layer has its fewest, whatever the budget.

    `ranked` is what `shares` returns. `miss_cost_s` is what one miss costs in each layer; where it is not known, it is
    taken to grow with the expert's size. With `in_turns` a token's experts take turns where there are not slots for all
    of them.
    """

    def rest(slots: Sequence[int]) -> int:
        return budget_bytes - sum(slot_bytes(layer, n) for layer, n in zip(layers, slots, strict=True))

    slots = [least_slots(layer) for layer in layers]
    if in_turns and rest(slots) < 0:
        slots = [least_slots(layer, in_turns=True) for layer in layers]
    left = rest(slots)

    def saving(i: int) -> float:
        cost = layers[i].expert_bytes if miss_cost_s is None else miss_cost_s[i]
        return layers[i].top_k * ranked[i][slots[i]] * cost / layers[i].expert_bytes

    def entry(i: int) -> tuple[float, float, int]:
        # Among equals the emptier bank comes first, so that layers that are alike get alike.
        return -saving(i), slots[i] / layers[i].experts, i

    waiting = [entry(i) for i, layer in enumerate(layers) if slots[i] < layer.experts]
    heapq.heapify(waiting)
    while waiting:
        _, _, i = heapq.heappop(waiting)
        if layers[i].expert_bytes > left:
            continue
        left -= layers[i].expert_bytes
        slots[i] += 1
        if slots[i] < layers[i].experts:
            heapq.heappush(waiting, entry(i))
    return tuple(slots)


def staging_bytes(layers: Sequence[LayerExperts], prefill_tokens: int, read_threads: int = THREADS) -> int:
    """Return what streaming holds beside the banks: buffers to read into, and what prefill keeps, a layer at a time.

    Prefill goes group by group of experts through a chunk of `prefill_tokens` tokens. It keeps the outputs of all pairs
    of token and expert in f32 [tokens, top_k, hidden] until they are put in the order of ranks. A group, which may be
    all of them, takes the rows that go in, as many as there are pairs, and three rows of the experts' inner size each.
    """
    largest = max((part.nbytes for layer in layers for part in layer.parts), default=0)
    reading = read_threads * read_buffer_bytes(largest)
    return reading + max((_prefill_bytes(layer, prefill_tokens) for layer in layers), default=0)


def _prefill_bytes(layer: LayerExperts, tokens: int) -> int:
    # The rows of a weight are what its projection puts out, packed or not.
    rows = {part.projection: part.shape[0] for part in layer.parts if part.name == "weight"}
    hidden = rows.get("down_proj", rows.get("fc2", 0))
    inner = rows.get("up_proj", rows.get("fc1", 0))
    return 4 * tokens * layer.top_k * (2 * hidden + 3 * inner)


def plan_stream(
    layers: Sequence[LayerExperts],
    room_bytes: int,
    *,
    prefill_tokens: int,
    lent_bytes: int = 0,
    popularity: Popularity | None = None,
    miss_cost_s: Sequence[float] | None = None,
    expert_slots: str | int | None = None,
    in_turns: bool = False,
    read_threads: int = THREADS,
) -> StreamPlan:
    """Divide `room_bytes`, what the ceiling leaves beside everything else, among the banks of `layers`.

    `lent_bytes` more are theirs for as long as nobody else needs them. `expert_slots` sets the banks by hand instead,
    whether they fit or not. `in_turns` says that a token's experts need not have slots all at once. Banks
    are never smaller than what works: whoever asked checks whether they fit.
    """
    ranked = shares(layers, popularity)
    staging = staging_bytes(layers, prefill_tokens, read_threads)
    if expert_slots is None:
        slots = allocate(layers, room_bytes - staging, ranked, miss_cost_s, in_turns=in_turns)
        lent = allocate(layers, room_bytes - staging + lent_bytes, ranked, miss_cost_s, in_turns=in_turns)
    else:
        slots = lent = slots_by_hand(layers, expert_slots)
    rates = [list(accumulate(each))[n - 1] for each, n in zip(ranked, slots, strict=True)]
    rates = [1.0 if n == layer.experts else min(1.0, r) for layer, n, r in zip(layers, slots, rates, strict=True)]
    requests = sum(layer.top_k for layer in layers)
    return StreamPlan(
        slots=slots,
        lent_slots=tuple(map(max, slots, lent)),
        experts=tuple(layer.experts for layer in layers),
        top_k=tuple(layer.top_k for layer in layers),
        expert_bytes=tuple(layer.expert_bytes for layer in layers),
        bank_bytes=sum(slot_bytes(layer, n) for layer, n in zip(layers, slots, strict=True)),
        least_bank_bytes=sum(slot_bytes(layer, least_slots(layer, in_turns=in_turns)) for layer in layers),
        staging_bytes=staging,
        hit_rates=tuple(rates),
        hit_rate=sum(layer.top_k * rate for layer, rate in zip(layers, rates, strict=True)) / max(1, requests),
        known=popularity is not None and any(sum(counts) > 0 for counts in popularity),
        by_hand=expert_slots is not None,
    )


def with_experts(
    plan: Plan,
    layers: Sequence[LayerExperts],
    other_bytes: int,
    *,
    prefill_tokens: int,
    popularity: Popularity | None = None,
    miss_cost_s: Sequence[float] | None = None,
    expert_slots: str | int | None = None,
    in_turns: bool = False,
    lends: bool = True,
    read_threads: int = THREADS,
) -> Plan:
    """Turn the plan of a model that is wholly resident into the one to load it by.

    Where all fits under the ceiling, and no slots were asked for, experts stay resident, and the plan only learns which
    smaller ceiling would do; see `plan_stream` for `in_turns`. Else their banks get what is left beside
    `other_bytes`, the weights that are no experts, and if it `lends` the KV cache's memory as well, which they must be
    able to give back.

    Raises UsageError where slots are asked for and there are no experts to give them to.
    """
    if not layers:
        if expert_slots is not None:
            raise UsageError("expert_slots is for models with routed experts, and this one has none; leave it out.")
        return plan
    beside = replace(plan, resident_bytes=other_bytes)
    stream = plan_stream(
        layers,
        plan.ceiling_bytes - beside.beside_banks_bytes,
        prefill_tokens=prefill_tokens,
        lent_bytes=plan.kv_bytes if lends else 0,
        popularity=popularity,
        miss_cost_s=miss_cost_s,
        expert_slots=expert_slots,
        in_turns=in_turns,
        read_threads=read_threads,
    )
    least = beside.total_with(stream.least_bank_bytes + stream.staging_bytes)
    # The buffers of streaming may take more than the experts of a tiny model.
    if expert_slots is None and plan.total_bytes <= max(plan.ceiling_bytes, least):
        return replace(plan, streamed_least_bytes=least)
    return replace(beside, stream=stream, streamed_least_bytes=least)


def choose_step(plans: Sequence[Plan], *, by_hand: bool = False) -> int:
    """Return which of several plans to load by: they differ in the tokens of a prefill step, from long to short.

    The first one that fits and whose buffers leave the banks twice what they take themselves; else the shortest step.
    Banks set `by_hand` lose nothing to buffers: there the first that fits.
    """
    for i, plan in enumerate(plans):
        stream = plan.stream
        modest = by_hand or stream is None or 2 * stream.staging_bytes <= stream.bank_bytes
        if modest and plan.total_bytes <= plan.ceiling_bytes:
            return i
    return len(plans) - 1


def predict_tokens_per_s(
    read_bytes: int, weight_bytes_per_s: float, stream: StreamPlan | None = None, disk_bytes_per_s: float | None = None
) -> float:
    """Return the tokens a second that reading weights allows, at the rates given.

    `read_bytes` are the weights that every token reads in memory, experts left out where they are streamed: their reads
    are added here. Experts that miss are read from disk while those that hit compute, and compute then themselves.
    """
    seconds = read_bytes / weight_bytes_per_s
    if stream is not None:
        if not disk_bytes_per_s:
            raise ValueError("streamed experts need the disk's rate")
        for k, size, hit in zip(stream.top_k, stream.expert_bytes, stream.hit_rates, strict=True):
            computing, missed = k * hit * size / weight_bytes_per_s, k * (1 - hit) * size
            seconds += max(computing, missed / disk_bytes_per_s) + missed / weight_bytes_per_s
    return 1 / seconds


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain JSON values, with what follows from them."""
    slots = None if plan.stream is None else list(plan.stream.slots)
    return asdict(plan) | {
        "slots": slots,
        "total_bytes": plan.total_bytes,
        "smallest_ceiling_bytes": plan.smallest_ceiling_bytes,
        "fits": plan.total_bytes <= plan.ceiling_bytes,
    }
