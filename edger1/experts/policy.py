"""Which expert a full bank gives up: LRU, LFU with aging, S3-FIFO, and `Successor`, which learns who follows whom.

One policy serves one layer. A step asks for top_k experts at once; each that is missing takes the slot of a victim, and
nobody of the step may be one. So a policy ranks the resident experts by how soon they will be asked for again, and a
good one needs to know what the router does next. Routing is balanced in training, so popularity says little; recency
says more; but what says most is which experts are in use right now, because experts come in company. `Successor` learns
that company online, from the routing alone, without a look at hidden states, weights or router scores.

Successor estimates for each expert e the discounted time to its next use,

    V_t(e) = E[gamma ** (T - 1)]        T: steps from t to the next step that uses e

as a linear function of a decaying trace of what was used, V_t = b + (x_t - 1) W, by temporal differences: the estimate
of step t should have been 1 for what step t + 1 used, and gamma V_{t+1} for all else (Sutton 1988; as a table of who
follows whom, Dayan's successor representation, 1993). The expert with the smallest V goes: Belady's rule, on estimates.

Plain Python and NumPy: use and victim together stay below 10 us for 128 experts, 8 of them a step
(`python -m benchmarks.policy --only cost`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np


class Policy(Protocol):
    """Decides for one layer which resident expert makes room."""

    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """Take note of one call of the layer: its distinct experts, in rank order, whether they were resident or not.

        `scores` [experts] float32 are the router's scores of all experts in the call's last row, where known.
        """
        ...

    def victim(self, resident: Collection[int], keep: Collection[int]) -> int | None:
        """Return the expert of `resident` to evict, never one of `keep`; None where all of them are to be kept.

        Both are best given as sets or dictionaries: their members are looked up one by one.
        """
        ...

    def warm(self, counts: Sequence[float]) -> None:
        """Start from how often each expert was used before; called before the first use."""
        ...


class LRU:
    """Evicts the least recently used expert; of the same step, the lower in rank."""

    def __init__(self, experts: int) -> None:
        self._order = dict.fromkeys(range(experts - 1, -1, -1))

    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """Move the call's experts to the recent end."""
        for expert in reversed(experts):
            del self._order[expert]
            self._order[expert] = None

    def victim(self, resident: Collection[int], keep: Collection[int]) -> int | None:
        """Return the resident expert whose last use is longest ago."""
        return next((e for e in self._order if e in resident and e not in keep), None)

    def warm(self, counts: Sequence[float]) -> None:
        """Count what was used more as used later."""
        self._order = dict.fromkeys(sorted(self._order, key=lambda expert: counts[expert]))


class _Ranked:
    """Evicts by a value of each expert, the lowest first; the values of a step are ranked once, when first needed."""

    def __init__(self) -> None:
        self._ranking: list[int] | None = None
        self._next = 0

    def _values(self) -> np.ndarray:
        raise NotImplementedError

    def victim(self, resident: Collection[int], keep: Collection[int]) -> int | None:
        """Return the resident expert of the lowest value."""
        if self._ranking is None:
            self._ranking, self._next = self._values().argsort().tolist(), 0
        # A step that evicts several goes on where it stopped. What was passed over may have become resident since, or
        # need not be kept any more, so the last resort is to look at all.
        for start in (self._next, 0):
            for place in range(start, len(self._ranking)):
                expert = self._ranking[place]
                if expert in resident and expert not in keep:
                    self._next = place + 1
                    return expert
        return None


class LFU(_Ranked):
    """Evicts the expert used least, where each step's uses count half after `half_life` more steps."""

    def __init__(self, experts: int, half_life: float = 4.0) -> None:
        super().__init__()
        self._decay = np.float32(0.5 ** (1 / half_life))
        self._uses = np.zeros(experts, np.float32)

    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """Age all counts, then count the call."""
        self._uses *= self._decay
        self._uses[experts] += 1
        self._ranking = None

    def warm(self, counts: Sequence[float]) -> None:
        """Start from counts that are small beside one use, so that they decide only among the unused."""
        self._uses[:] = _relative(counts) * 1e-3
        self._ranking = None

    def _values(self) -> np.ndarray:
        return self._uses


class Scored(LFU):
    """LFU to which each step adds, for the unchosen experts, how near the router came to choosing them.

    Nearness is relative to the range of the step's scores, so that logits, probabilities and biased scores all serve.
    """

    def __init__(self, experts: int, half_life: float = 4.0, weight: float = 0.25) -> None:
        super().__init__(experts, half_life)
        self._weight = np.float32(weight)

    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """Count the call, and in part what it nearly chose."""
        super().use(experts)
        if scores is not None and 0 < len(experts) < len(scores):
            threshold = scores[experts].min()
            spread = max(float(scores.std()), 1e-12)
            near = np.exp(np.minimum(scores - threshold, 0) / spread)
            near[experts] = 0
            self._uses += self._weight * near


class S3FIFO:
    """S3-FIFO (Yang et al., SOSP 2023): a small queue for newcomers, a main queue, a memory of who left the small one.

    A newcomer that is not used again before it has passed the small queue (a tenth of the slots) goes, so a scan passes
    without flooding the main queue; one that returns soon after goes into the main queue.
    """

    SMALL_SHARE = 0.1

    def __init__(self, experts: int) -> None:
        self._small: deque[int] = deque()
        self._main: deque[int] = deque()
        self._queued: set[int] = set()
        self._ghosts: dict[int, None] = {}
        self._hits = [0] * experts
        self._slots = experts

    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """Count hits; queue what is new."""
        for expert in experts:
            if expert in self._queued:
                self._hits[expert] = min(3, self._hits[expert] + 1)
            else:
                self._admit(expert)

    def victim(self, resident: Collection[int], keep: Collection[int]) -> int | None:
        """Return the expert that the queues give up, and take it out of them."""
        self._slots = len(resident)
        for expert in resident:
            if expert not in self._queued:  # prefetched, say
                self._admit(expert)
        small_first = len(self._small) > self.SMALL_SHARE * self._slots
        for queue in (self._small, self._main) if small_first else (self._main, self._small):
            found = self._from(queue, resident, keep)
            if found is not None:
                return found
        return None

    def warm(self, counts: Sequence[float]) -> None:
        """Put the more used half into the main queue, the most used last."""
        order = sorted(range(len(counts)), key=lambda expert: counts[expert])
        self._main.extend(order[len(order) // 2 :])
        self._queued.update(self._main)

    def _admit(self, expert: int) -> None:
        self._hits[expert] = 0
        self._queued.add(expert)
        if expert in self._ghosts:
            del self._ghosts[expert]
            self._main.append(expert)
        else:
            self._small.append(expert)

    def _from(self, queue: deque[int], resident: Collection[int], keep: Collection[int]) -> int | None:
        # An expert comes round at most four times: it loses a hit, or leaves, each time.
        for _ in range(4 * len(queue) + 4):
            if not queue:
                return None
            expert = queue.popleft()
            if expert not in resident:
                self._queued.discard(expert)
            elif expert in keep:
                queue.append(expert)
            elif self._hits[expert]:
                self._hits[expert] = 0 if queue is self._small else self._hits[expert] - 1
                self._main.append(expert)
            else:
                self._queued.discard(expert)
                if queue is self._small:
                    self._remember(expert)
                return expert
        return None

    def _remember(self, expert: int) -> None:
        self._ghosts[expert] = None
        while len(self._ghosts) > self._slots:
            del self._ghosts[next(iter(self._ghosts))]


class Successor(_Ranked):
    """Evicts the expert whose next use it expects last, from what has been used of late; see the module's docstring.

    The trace x has a mean of 1, whatever the size of a call, so that a prefill chunk that uses all experts leaves it
    nearly as it was. Calls that use more than half of the experts teach nothing. Learning is done for `BATCH` steps at
    a time, which costs a fraction of doing it each step and loses next to nothing.
    """

    TRACE_DECAY = 0.7
    RATE = 0.05
    BASE_RATE = 0.006
    FIRST_WEIGHT = 0.06
    """How much an expert's own recent use counts before anything is learned: at first, this is LFU with aging."""
    SHORTEST_DISCOUNT = 0.8
    BATCH = 16

    def __init__(self, experts: int) -> None:
        super().__init__()
        self._experts = experts
        self._weights = np.eye(experts, dtype=np.float32) * np.float32(self.FIRST_WEIGHT)
        self._base = np.full(experts, 0.5, np.float32)
        self._discount = np.float32(self.SHORTEST_DISCOUNT)
        # Row 0 is x before the steps of the batch, row s what step s adds to it: x_s = decays[s] @ recent.
        self._recent = np.zeros((self.BATCH + 1, experts), np.float32)
        self._recent[0] = 1
        self._step = 0
        age = np.subtract.outer(np.arange(self.BATCH + 1), np.arange(self.BATCH + 1))
        self._decays = np.where(age < 0, 0, self.TRACE_DECAY ** np.maximum(age, 0)).astype(np.float32)
        self._ones = np.ones(experts, np.float32)
        self._space = np.empty((2, experts), np.float32)
        self._set_constant()

    def use(self, experts: Sequence[int], scores: np.ndarray | None = None) -> None:
        """Move the trace on; learn where enough steps have come together."""
        self._ranking = None
        self._step += 1
        row, count = self._recent[self._step], max(1, len(experts))
        added = (1 - self.TRACE_DECAY) * self._experts / count
        if 2 * count > self._experts:
            row[experts] = added
            # Its neighbours tell nothing of each other: what follows begins anew.
            self._begin(self._trace())
            return
        for expert in experts:  # faster than by an index array for the few of a step
            row[expert] = added
        if self._step == self.BATCH:
            self._discount = np.float32(max(self.SHORTEST_DISCOUNT, 1 - count / self._experts))
            self._learn()

    def warm(self, counts: Sequence[float]) -> None:
        """Set each expert's V as if it were used at random, as often as `counts` say.

        With probability q = r / n of use in a step, r its popularity relative to the mean, and gamma = 1 - 1/n, V is
        r / (1 + r) for large n, whatever n is.
        """
        relative = _relative(counts)
        self._base[:] = relative / (1 + relative)
        self._set_constant()
        self._ranking = None

    def _trace(self) -> np.ndarray:
        return self._decays[self._step] @ self._recent

    def _values(self) -> np.ndarray:
        # As `_trace() @ weights + constant`, without NumPy's overhead of making arrays, which is a third of the time.
        trace, values = self._space
        self._decays[self._step].dot(self._recent, trace)
        trace.dot(self._weights, values)
        values += self._constant
        return values

    def _begin(self, trace: np.ndarray) -> None:
        self._recent[1:] = 0
        self._recent[0] = trace
        self._step = 0

    def _set_constant(self) -> None:
        self._constant = self._base - self._ones @ self._weights  # V = b + (x - 1) W = x W + constant

    def _learn(self) -> None:
        """One step of gradient for each pair of neighbouring steps, normalised by the length of the trace (NLMS)."""
        traces = self._decays.dot(self._recent)
        estimates = traces.dot(self._weights)
        estimates += self._constant
        targets = (self._discount * estimates[1:]).clip(0, self._discount)
        np.putmask(targets, self._recent[1:] > 0, 1)
        errors = targets - estimates[:-1]
        before = traces[:-1] - 1
        rates = self.RATE / np.maximum(np.vecdot(before, before), 1)
        self._weights += (before * rates[:, None]).T @ errors
        self._base += np.float32(self.BASE_RATE) * np.add.reduce(errors)
        self._set_constant()
        self._begin(traces[-1])


def _relative(counts: Sequence[float]) -> np.ndarray:
    """Return counts as float32 multiples of their mean; ones where nothing was counted."""
    values = np.asarray(counts, np.float32)
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)


POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": LRU,
    "lfu": LFU,
    "s3-fifo": S3FIFO,
    "scored": Scored,
    "successor": Successor,
}
"""Name -> what makes a policy for a layer of so many experts."""

DEFAULT_POLICY = "successor"
