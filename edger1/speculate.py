"""Speculative decoding: tokens are drafted cheaply, and the model verifies several of them in one pass.

    known text, last token not fed -> k drafts -> one pass over last token + drafts -> those that stand, and one more

Drafts come from the text itself (`drafting/lookup.py`), from the model's MTP layer (`drafting/mtp.py`) or from a
smaller model (`drafting/other_model.py`). What is said is what plain decoding says: token by token for greedy answers
and seeds, since up to 16 rows of the kernels have the bits that each has alone, and in distribution for all others
(`drafting/draws.py`). How many are drafted, and whether any are, follows from measured times (`drafting/length.py`).

The pass leaves the keys of all drafts in the caches; those of drafts that do not stand are trimmed off. Caches that
cannot be trimmed (a window that has gone round, a state of fixed size) end drafting, and the figures say so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edger1.drafting.draws import Draws
from edger1.drafting.length import Acceptance, Cost, Length
from edger1.drafting.lookup import Lookup
from edger1.drafting.mtp import Kept, MTPDrafter
from edger1.drafting.other_model import ModelDrafter
from edger1.drafting.passes import Keys, Pass, Snapshot, buildable
from edger1.errors import UsageError
from edger1.experts.figures import BYTES_READ, STALL_S

if TYPE_CHECKING:
    from edger1.loader import LiveModel
    from edger1.sampling import RandomState, RandomTurn, Sampler

MOST_ROWS = 16
"""Rows of a pass up to which the kernels give each the bits that it has alone."""
_MOST_AHEAD = 7
"""Drafts of models: fewer and fewer of those further on stand."""
_AGREEMENTS = ((10, 0.9), (6, 0.75), (4, 0.55), (3, 0.4), (2, 0.3))
"""Tokens that agree where look-up found its drafts, and the share of those that is expected to stand."""
_EXPECTED = {"mtp": 0.7, "draft": 0.6}
_EACH = {"lookup": 0.15, "mtp": 0.35, "draft": 0.5}
"""What one draft more may cost before it was measured, as a share of what a plain step computes."""
_TRIAL = {"lookup": (3, 1), "mtp": (1, 12), "draft": (2, 6)}
"""Drafts of a trial of a source that loses, and steps with so many: a model's first step catches up on the text, and
the times of the next ones vary more than what is looked for."""


@dataclass
class _Choice:
    source: str
    count: int
    acceptance: Acceptance
    tokens: list[int] | None = None


@dataclass
class _Counts:
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    said: int = 0
    seconds: float = 0.0


def check(model: LiveModel, wanted: str) -> None:
    """Raise UsageError where the model has not what the drafts asked for come from."""
    if wanted == "mtp" and model.ahead is None:
        raise UsageError(f"{model.name} was loaded without an MTP layer{_why(model)}; leave speculate out, or off.")
    if wanted == "draft" and model.draft is None:
        raise UsageError(f"{model.name} was loaded without a draft model. Name one when loading: --draft MODEL.")


def _why(model: LiveModel) -> str:
    return f" ({model.no_ahead})" if model.no_ahead else ""


class Speculation:
    """The drafts of one answer."""

    def __init__(
        self, model: LiveModel, wanted: str, sampler: Sampler, random: RandomState, turn: RandomTurn, *, seeded: bool
    ) -> None:
        check(model, wanted)
        self._model = model
        self._figures = [streaming.figures for streaming in model.streamings]
        self._draws = Draws(sampler, random, turn, seeded=seeded)
        self._lookup = Lookup() if wanted in ("auto", "lookup") else None
        ahead = model.ahead if wanted in ("auto", "mtp") else None
        self._mtp = None if ahead is None else MTPDrafter(ahead)
        self._other: ModelDrafter | None = None
        if wanted in ("auto", "draft") and model.draft is not None:
            self._other = ModelDrafter(model.draft, model.vocabulary)
        self.off = _reason(model, wanted)
        """Why nothing is drafted; empty where drafts are made."""
        pace = model.pace
        sources = [("lookup", MOST_ROWS - 1), ("mtp", _MOST_AHEAD), ("draft", _MOST_AHEAD)]
        self._lengths = {name: Length(name, pace, most, _EACH[name], *_TRIAL[name]) for name, most in sources}
        self._agreed = [Acceptance(share) for _, share in _AGREEMENTS]
        self._accepted = {name: Acceptance(share) for name, share in _EXPECTED.items()}
        self._choice: _Choice | None = None
        self._counts: dict[str, _Counts] = {}
        self._began: float | None = None
        self._ended: float | None = None
        self._before = (0.0, 0.0)
        # Where the drafts of the step before came from, "" if it was a plain one, None before any.
        self._source_before: str | None = None
        self._is_usual = True
        # How many tokens the next step may say but one, how many the last one said, and a pass that was begun early.
        self._room = self._said = 0
        self._early: Pass | None = None

    def begin(self, caches: list[Any] | None) -> list[Any] | None:
        """Take out of `caches`, which an earlier request has left, what is the MTP layer's; returns the model's own."""
        kept = caches[-1] if caches and isinstance(caches[-1], Kept) else None
        self._early = None
        if self._mtp is not None:
            self._mtp.begin(kept)
        if self._other is not None:
            self._other.begin()
        return caches[:-1] if caches and kept is not None else caches

    def leave(self, caches: list[Any], fed: int) -> list[Any]:
        """Return the model's caches, of `fed` tokens, with what the MTP layer knows of these."""
        self._early = None
        kept = None if self._mtp is None else self._mtp.leave(fed)
        return caches if kept is None else [*caches, kept]

    def drop(self) -> None:
        """Give the memory of drafting models' caches back; another text may follow."""
        self._lookup = None if self._lookup is None else Lookup()
        self._early = None
        for drafter in (self._mtp, self._other):
            if drafter is not None:
                drafter.begin()

    def lend(self) -> None:
        """Keep nothing of the caches: others write in them. A pass that was begun early is never taken then."""
        self._early = None

    @property
    def observes(self) -> bool:
        """Whether `forward` has to know the text."""
        return self._mtp is not None and not self.off

    def forward(self, tokens: Any, caches: list[Any], first: int, known: Sequence[int]) -> Any:
        """Pass tokens [1, L], which stand at positions from `first` on, through the model; returns logits [1, L, V].

        `known` is the text so far, where `observes`.
        """
        self.lend()
        if self._mtp is None or self.off or self._model.ahead is None:
            return self._model.model(tokens, cache=caches)
        hidden, logits = self._model.ahead.forward(tokens, caches)
        if self._model.streaming is not None:
            import mlx.core as mx

            # Nobody may read these for long; what is begun is waited for before other experts take the slots it reads.
            mx.async_eval(hidden)
        self._mtp.observe(hidden, first, known)
        return logits

    def choose(self, known: Sequence[int], caches: Sequence[Any], room: int, *, unread: bool) -> int:
        """Return how many drafts the next step is to verify, `room` at most; 0 for a plain step.

        With `unread` the token after `known` was drawn already: the answer then is for the step after that one.
        """
        self._began, self._before = time.perf_counter(), self._read()
        self._choice, self._room = None, room
        room = min(room, MOST_ROWS - 1)
        if self.off or room < 1:
            return 0
        best = 1.0
        for choice, gain in self._candidates(known, room, unread):
            if choice.count and (self._choice is None or gain > best):
                self._choice, best = choice, gain
        if self._choice is None and self._source_before is not None:
            # Caches are looked at where it matters, and once at the beginning.
            return 0
        self.off = _untrimmable(caches, room + 1)
        if self.off:
            self._choice = None
        return self._choice.count if self._choice is not None else 0

    def _candidates(self, known: Sequence[int], room: int, unread: bool) -> list[tuple[_Choice, float]]:
        found = []
        match = None if self._lookup is None else self._lookup.find(known, room)
        if match is not None:
            bucket = next(i for i, (agreed, _) in enumerate(_AGREEMENTS) if match.agreed >= agreed)
            count, gain = self._lengths["lookup"].choose(self._agreed[bucket], room)
            found.append((_Choice("lookup", count, self._agreed[bucket], match.tokens[:count]), gain))
        for drafter in (self._mtp, self._other):
            if drafter is not None and (unread or drafter.ready(known)):
                count, gain = self._lengths[drafter.name].choose(self._accepted[drafter.name], room)
                found.append((_Choice(drafter.name, count, self._accepted[drafter.name]), gain))
        return found

    def step(self, known: Sequence[int], caches: list[Any]) -> list[int]:
        """Make the drafts that `choose` decided on and verify them; returns what is said.

        The caches then hold all of the text but the last token; `settle` says how much of it stays.
        """
        from mlx_lm.models.cache import trim_prompt_cache

        choice = self._choice
        assert choice is not None
        self._lengths[choice.source].taken()
        self._is_usual = True
        if self._builds_ahead(choice, caches):
            said = self._verify_ahead(choice, known, caches)
        else:
            self._early = None
            said = self._verify(choice, known, caches)
            if choice.count + 1 > len(said):
                trim_prompt_cache(caches, choice.count + 1 - len(said))
        self._said = len(said)
        choice.acceptance.note(choice.count, len(said) - 1)
        counts = self._counts.setdefault(choice.source, _Counts())
        counts.steps += 1
        counts.drafted += choice.count
        counts.accepted += len(said) - 1
        return said

    def _builds_ahead(self, choice: _Choice, caches: list[Any]) -> bool:
        """Whether the pass after this one can be built before this one is read."""
        apart = self._model.streaming is None and buildable(caches, choice.count + 1)
        return choice.source == "mtp" and self._draws.together and apart

    def _verify(self, choice: _Choice, known: Sequence[int], caches: list[Any]) -> list[int]:
        """Make drafts and verify them; the caches then hold the last of `known` and all drafts."""
        import mlx.core as mx

        self._draws.begin(choice.count + 1)
        drafts: Any
        q = None
        if choice.tokens is not None:
            tokens, drafts = mx.array([[known[-1], *choice.tokens]], mx.uint32), choice.tokens
        else:
            drafter = self._mtp if choice.source == "mtp" else self._other
            assert drafter is not None
            # Whoever has much to read first takes longer than the drafts.
            self._is_usual = drafter.behind(known) <= MOST_ROWS
            drafts, q = drafter.draft(known, choice.count, self._draws)
            choice.count = int(drafts.size)
            # They are computed while Python prepares the pass that verifies them.
            mx.async_eval(drafts)
            tokens = mx.concatenate([mx.array([known[-1]], mx.uint32), drafts])[None]
        logits = self.forward(tokens, caches, len(known) - 1, known)[0]
        return self._draws.verify(logits, drafts, known, q)[1]

    def _verify_ahead(self, choice: _Choice, known: Sequence[int], caches: list[Any]) -> list[int]:
        """Verify drafts of the MTP layer, in a pass that was built earlier if there is one, and build the next."""
        import mlx.core as mx

        mtp, length = self._mtp, len(known)
        assert mtp is not None
        now, self._early = self._early, None
        if now is not None and now.length == length and now.count <= choice.count and now.resume(caches):
            choice.count = now.count
        else:
            self._is_usual = mtp.behind(known) <= MOST_ROWS
            keys = self._draws.begin(choice.count + 1)
            drafts, _ = mtp.draft(known, choice.count, self._draws)
            choice.count = int(drafts.size)
            now = self._pass(mx.array([known[-1]], mx.uint32), drafts, caches, length, keys)
            mx.async_eval(now.drawn)
        mtp.observe(now.hidden, length - 1, known)
        count = now.count
        # Python is at work here while the pass is computed.
        before, before_mtp = Snapshot(caches), mtp.state()
        then = self._next(now.drawn, length + count + 1, self._room - count - 1, caches, after=now.keys)
        drafts_read, drawn = now.drafts.tolist(), now.drawn.tolist()
        self._draws.resume(now.keys)
        said = self._draws.said(drafts_read, drawn)
        if then is not None and (len(said) <= count or self._ends(said)):
            before.put_back()
            before_mtp()
            then = None
        # Whoever holds their arrays keeps the caches from being written in place.
        del before, before_mtp
        if then is None:
            for cache in caches:
                cache.trim(count + 1 - len(said))
            mtp.keep(length + len(said) - 1)
            if not self._ends(said):
                then = self._next(
                    mx.array(said, mx.uint32), length + len(said), self._room - len(said), caches, after=None
                )
        if then is not None:
            mx.async_eval(then.drawn)
            self._early = then
        return said

    def _next(self, said: Any, length: int, room: int, caches: list[Any], *, after: Keys | None) -> Pass | None:
        """Build the pass that follows when a step says `said`, which may not be read yet, after which the text is
        `length` tokens long; None where that is not possible or not worth it.
        """
        mtp, choice = self._mtp, self._choice
        assert mtp is not None
        assert choice is not None
        count = min(choice.count, room)
        # Its hidden states are to be the last step's, and there is to be room in the caches.
        if count < 1 or mtp.waiting != said.size or not buildable(caches, count + 1):
            return None
        keys = self._draws.begin(count + 1, after)
        drafts = mtp.draft_ahead(said, length, count, self._draws)
        made = self._pass(said[-1:], drafts, caches, length, keys)
        made.lay_aside(caches)
        return made

    def _pass(self, last: Any, drafts: Any, caches: list[Any], length: int, keys: Keys) -> Pass:
        import mlx.core as mx

        ahead = self._model.ahead
        assert ahead is not None
        hidden, logits = ahead.forward(mx.concatenate([last, drafts])[None], caches)
        return Pass(length, int(drafts.size), drafts, self._draws.drawn(logits[0]), hidden, keys)

    def _ends(self, said: Sequence[int]) -> bool:
        return not self._model.tokenizer.eos_token_ids.isdisjoint(said)

    def settle(self, fed: int, caches: list[Any], said: int) -> None:
        """Trim the caches to the `fed` tokens that stay, after a step of whose tokens `said` were said."""
        from mlx_lm.models.cache import trim_prompt_cache

        if self._said > said:
            self._early = None
            trim_prompt_cache(caches, self._said - said)
        if self._mtp is not None:
            self._mtp.keep(fed)

    def back(self, caches: list[Any], count: int, fed: int) -> bool:
        """Take the last `count` tokens out of the caches, so that `fed` are left; False where they cannot be."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        if self._lookup is not None:
            self._lookup = Lookup()
        if self._mtp is not None:
            self._mtp.back(fed)
        if self._other is not None:
            self._other.back(fed)
        if not count:
            return True
        return bool(can_trim_prompt_cache(caches)) and trim_prompt_cache(caches, count) == count

    def end(self, said: int, *, drafted: bool) -> None:
        """Note that a step has ended that said so many tokens, all its work done."""
        if self._began is None:
            return
        now = time.perf_counter()
        seconds, choice = now - self._began, self._choice
        # What is between two steps belongs to decoding, unless other requests were served there.
        between = 0.0 if self._ended is None else self._began - self._ended
        seconds += between if between < seconds else 0.0
        self._began, self._ended = None, now
        if self._source_before is not None and self._is_usual:
            # Changing over to plain steps is what drafting costs.
            source = choice.source if choice is not None else self._source_before
            self._model.pace.came_of(source, said, seconds)
        stall, nbytes = self._read()
        cost = Cost(seconds, min(seconds, stall - self._before[0]), nbytes - self._before[1])
        if drafted and choice is not None and self._is_usual:
            counts = self._counts[choice.source]
            counts.said += said
            counts.seconds += seconds
            # The MTP layer's first step after others is not as those that follow, whose passes were built ahead.
            if choice.source != "mtp" or self._source_before == "mtp":
                self._model.pace.note(choice.source, choice.count, cost)
        elif choice is None and self._source_before == "":
            # Nor is the first plain step after others.
            self._model.pace.note_plain(cost)
        self._source_before = "" if choice is None else choice.source

    def _read(self) -> tuple[float, float]:
        """Return the seconds that were lost to reads of experts, and their bytes, since loading."""
        if not self._figures:
            return 0.0, 0.0
        stall_s, nbytes = (sum(float(t[:, i].sum()) for t in self._figures) for i in (STALL_S, BYTES_READ))
        return stall_s, nbytes

    def figures(self) -> dict[str, Any]:
        """Return what came of it as plain JSON values:

        "drafted", "accepted", "steps"  tokens, and passes that verified some
        "gain"      tokens a second in those passes, over those of plain steps; None where that was not measured
        "sources"   drafted and accepted of each source
        "off"       why nothing was drafted, or no more; empty where that was free
        """
        counts = self._counts.values()
        seconds, said, plain = sum(c.seconds for c in counts), sum(c.said for c in counts), self._model.pace.plain
        return {
            "drafted": sum(c.drafted for c in counts),
            "accepted": sum(c.accepted for c in counts),
            "steps": sum(c.steps for c in counts),
            "gain": said * plain / seconds if seconds and plain else None,
            "sources": {n: {"drafted": c.drafted, "accepted": c.accepted} for n, c in self._counts.items()},
            "off": self.off,
        }


def _reason(model: LiveModel, wanted: str) -> str:
    """Return why nothing may be drafted, whatever the caches are; empty where it may."""
    if wanted == "off":
        return "switched off"
    if wanted == "auto" and (not model.installed.active or model.adapter is not None):
        return "rows of a pass may differ in rounding from those of plain decoding here; ask for drafts by name"
    return ""


def _untrimmable(caches: Sequence[Any], rows: int) -> str:
    """Return which caches could not take `rows` tokens and give them back; empty where all can."""
    from mlx_lm.models.cache import CacheList, RotatingKVCache

    for cache in caches:
        if isinstance(cache, CacheList):
            inside = _untrimmable(cache.caches, rows)
            if inside:
                return inside
        elif not cache.is_trimmable():
            return f"{type(cache).__name__} cannot give back what was not said"
        elif isinstance(cache, RotatingKVCache) and cache.offset + rows > cache.max_size:
            return f"the window of {cache.max_size} tokens is full, and gives nothing back"
    return ""
