"""How many drafts to verify: plain arithmetic on measured times and on how many drafts stood so far.

A step that verifies k drafts says 1 + a1 + a1 a2 + ... + a1...ak tokens on average, where aj is the share of drafts at
place j that stand when all before them did. It takes the time of one pass over k + 1 tokens and of making the drafts.
The k with the most tokens a second is taken, and none where plain decoding has more. While none is taken, a few drafts
are tried now and then, in growing intervals, since text changes.

That is a promise, of steps apart. What came of decoding with drafts in all, changing over included, is held against
what came of plain decoding; a source that was slower in the end must promise more the next time.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from statistics import fmean

_KEPT = 32
"""Measured times whose mean counts, without the largest and smallest eighth."""
_RENEWED = 4
"""Times after which that mean is taken anew: a small model's step takes not much longer than finding it."""
_LEAST_GAIN = 1.05
"""What drafting must promise over plain decoding."""
_MORE, _MOST_GAIN = 1.15, 1.5
"""How much more it must promise after it did not keep to that, and the most that is asked for."""
_JUDGED, _LATELY = 64, 0.995
"""Tokens after which it is judged by what came of it, and what an earlier token weighs for each later one."""
_LOST = 0.97
"""Share of plain decoding's rate below which that was no accident."""
_FIRST_TRIAL, _LAST_TRIAL = 24, 384
"""Plain tokens between two trials of a source that loses."""
_PLAIN_EVERY, _PLAIN_STEPS = 96, 3
"""Steps with drafts before plain ones are measured anew, and how many of those."""
_FORGET = 0.97
"""What an earlier draft weighs for each later one at its place."""


@dataclass(frozen=True)
class Cost:
    """What a step took: seconds, of which it stood still for reads of experts from disk, and the bytes of those."""

    seconds: float
    stall_s: float = 0.0
    nbytes: float = 0.0


class _Costs:
    """The last costs of one kind of step, and their means.

    No medians: where a step is begun while the last one is computed, the times of steps are of two kinds, in turns.
    """

    def __init__(self) -> None:
        self._last: deque[Cost] = deque(maxlen=_KEPT)
        self._added = 0
        self.compute_s = self.nbytes = 0.0

    def __len__(self) -> int:
        return len(self._last)

    def add(self, cost: Cost) -> bool:
        """Note one; True where the means are other ones now."""
        self._last.append(cost)
        self._added += 1
        if len(self._last) == _KEPT and self._added % _RENEWED:
            return False
        # What was measured once or twice may be an accident: the better of it is believed, so that it is tried again.
        middle = _mean if len(self._last) > 2 else min
        self.compute_s = middle([each.seconds - each.stall_s for each in self._last])
        self.nbytes = middle([each.nbytes for each in self._last])
        return True


def _mean(values: list[float]) -> float:
    without = len(values) // 8
    return fmean(sorted(values)[without : len(values) - without])


@dataclass
class _Trials:
    """When a source that loses is tried again: after `interval` plain tokens, of which `waited` were said, for some
    steps, of which `tried` were made."""

    interval: int = _FIRST_TRIAL
    waited: int = 0
    tried: int = 0


class _Record:
    """Tokens that were said one way lately, and the seconds that they took."""

    def __init__(self) -> None:
        self.count, self._tokens, self._seconds = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float) -> None:
        kept = _LATELY**tokens
        self._tokens = self._tokens * kept + tokens
        self._seconds = self._seconds * kept + seconds
        self.count += tokens

    @property
    def rate(self) -> float | None:
        """Tokens a second, None for too few of them."""
        return self._tokens / self._seconds if self.count >= _JUDGED and self._seconds > 0 else None


class Pace:
    """What steps cost: plain ones, and those with k drafts of one source. One for a model, across requests.

    Where experts are read from disk, drafts are priced in the bytes that verifying them reads, at what a byte has cost
    lately; where that was not measured, each draft is taken to read as much as a plain step does.
    """

    def __init__(self) -> None:
        self._plain = _Costs()
        self._steps: dict[str, dict[int, _Costs]] = {}
        self._stall_s = self._nbytes = 0.0
        self._records: dict[str, _Record] = {}
        self._demands: dict[str, float] = {}
        self.version = 0
        """Another number whenever what steps cost, or what is asked of a source, is something else."""
        self.trials: defaultdict[str, _Trials] = defaultdict(_Trials)
        """Of each source, across answers: most are short."""

    def came_of(self, source: str, tokens: int, seconds: float) -> None:
        """Note what was said with drafts of `source`, or with "" plainly, and all the time that it took."""
        record = self._records.setdefault(source, _Record())
        record.add(tokens, seconds)
        plain = self._records[""].rate if "" in self._records else None
        if source and record.rate is not None and plain is not None and record.rate < _LOST * plain:
            self._demands[source] = min(self.demand(source) * _MORE, _MOST_GAIN)
            self._records[source] = _Record()
            self.version += 1

    def demand(self, source: str) -> float:
        """Return what drafts of `source` must promise over plain decoding."""
        return self._demands.get(source, _LEAST_GAIN)

    def relent(self, source: str) -> None:
        """Ask for a little less of a source that was just tried again."""
        if source in self._demands:
            self._demands[source] = max(_LEAST_GAIN, self._demands[source] * 0.98)
            self.version += 1

    def note_plain(self, cost: Cost) -> None:
        """Note a step that said one token without drafts."""
        self.version += self._plain.add(cost)
        self._note_read(cost)

    def note(self, source: str, drafts: int, cost: Cost) -> None:
        """Note a step that made and verified so many drafts."""
        steps = self._steps.setdefault(source, {})
        if drafts not in steps:
            steps[drafts] = _Costs()
        self.version += steps[drafts].add(cost)
        self._note_read(cost)

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step, None before any was measured."""
        return self._plain.compute_s + self._priced(self._plain.nbytes) if len(self._plain) > 2 else None

    def seconds(self, source: str, drafts: int, each: float) -> float:
        """Return what a step with `drafts` drafts takes; see `curve`."""
        return self.curve(source, drafts, each)[-1]

    def curve(self, source: str, most: int, each: float) -> list[float]:
        """Return what steps with 1, 2, ... `most` drafts take: as measured, else from their neighbours.

        Beyond what was measured every draft takes `each` times what a plain step computes.
        """
        plain, price = self._plain, self._stall_s / self._nbytes if self._nbytes else 0.0
        compute_s, nbytes = plain.compute_s, plain.nbytes
        found: list[float] = []
        for drafts, costs in sorted(self._steps.get(source, {}).items()):
            gap = drafts - len(found)
            more_s, more_bytes = (costs.compute_s - compute_s) / gap, (costs.nbytes - nbytes) / gap
            found += [compute_s + i * more_s + (nbytes + i * more_bytes) * price for i in range(1, gap + 1)]
            compute_s, nbytes = costs.compute_s, costs.nbytes
        more_s, more_bytes = each * plain.compute_s, plain.nbytes
        found += [compute_s + i * more_s + (nbytes + i * more_bytes) * price for i in range(1, most - len(found) + 1)]
        return found[:most]

    def _priced(self, nbytes: float) -> float:
        return nbytes * self._stall_s / self._nbytes if self._nbytes else 0.0

    def _note_read(self, cost: Cost) -> None:
        if not (cost.stall_s or cost.nbytes or self._nbytes):
            return
        self.version += 1
        self._stall_s = self._stall_s * _FORGET + cost.stall_s
        self._nbytes = self._nbytes * _FORGET + cost.nbytes


class Acceptance:
    """Shares of drafts that stand, at the first place and at the later ones, where all before them did."""

    def __init__(self, expected: float, weight: float = 4.0) -> None:
        self._stood = [expected * weight, expected * weight]
        self._tried = [weight, weight]
        self.version = 0
        """Another number after each step."""

    def note(self, drafts: int, accepted: int) -> None:
        """Note a step of which `accepted` of `drafts` drafts stood."""
        self.version += 1
        for place in range(min(drafts, accepted + 1)):
            kind = min(place, 1)
            self._stood[kind] = self._stood[kind] * _FORGET + (place < accepted)
            self._tried[kind] = self._tried[kind] * _FORGET + 1

    def tokens(self, most: int) -> list[float]:
        """Return how many tokens steps with 1, 2, ... `most` drafts say on average."""
        first, later = (stood / tried for stood, tried in zip(self._stood, self._tried, strict=True))
        said, reached, found = 1.0, first, []
        for _ in range(most):
            said += reached
            reached *= later
            found.append(said)
        return found


@dataclass
class Length:
    """The choice for one source in one request.

    `each` is what a draft may cost before that was measured, as a share of what a plain step computes; `trial` is how
    many are drafted to see whether a source that loses would win, in `trial_steps` steps one after the other.
    """

    source: str
    pace: Pace
    most: int
    each: float
    trial: int = 2
    trial_steps: int = 1
    _drafted: int = 0
    _found: dict[Acceptance, tuple[tuple[int, int, int], tuple[int, float]]] = field(default_factory=dict)

    def choose(self, acceptance: Acceptance, room: int) -> tuple[int, float]:
        """Return how many drafts to verify, `room` at most, and the tokens a second that they promise over plain ones.

        Nothing is drafted before a plain step was measured. `taken` is to be called where the drafts are made.
        """
        plain = self.pace.plain
        most = min(self.most, room)
        if plain is None or most < 1:
            return 0, 1.0
        best, gain = self._best(acceptance, most, plain)
        trials = self.pace.trials[self.source]
        if best:
            trials.interval = _FIRST_TRIAL
            # What plain decoding takes is measured anew from time to time, or a machine that has less to do would go
            # unnoticed.
            if self._drafted < _PLAIN_EVERY:
                return best, gain
            self._drafted += 1
            self._drafted %= _PLAIN_EVERY + _PLAIN_STEPS
            return 0, 1.0
        trials.waited += 1
        return (min(self.trial, most), 1.0) if trials.waited >= trials.interval else (0, 1.0)

    def _best(self, acceptance: Acceptance, most: int, plain: float) -> tuple[int, float]:
        """Return the drafts that promise most, 0 where none promise enough, and what they do."""
        key = self.pace.version, acceptance.version, most
        known = self._found.get(acceptance)
        if known is not None and known[0] == key:
            return known[1]
        best, gain, least = 0, 1.0, self.pace.demand(self.source)
        costs = self.pace.curve(self.source, most, self.each)
        for drafts, (said, seconds) in enumerate(zip(acceptance.tokens(most), costs, strict=True), start=1):
            promised = said * plain / seconds
            if promised > max(gain, least):
                best, gain = drafts, promised
        self._found[acceptance] = key, (best, gain)
        return best, gain

    def taken(self) -> None:
        """Note that drafts are made as chosen."""
        self._drafted += 1
        trials = self.pace.trials[self.source]
        if trials.waited >= trials.interval:
            trials.tried += 1
            if trials.tried < self.trial_steps:
                return
            trials.interval = min(2 * trials.interval, _LAST_TRIAL)
            self.pace.relent(self.source)
        trials.waited = trials.tried = 0
