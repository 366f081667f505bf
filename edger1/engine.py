"""The step scheduler: everything that touches MLX happens here, on one thread.

Requests come in through a queue, events go out through a callback. The loop takes what has arrived, then gives the
next job in turn one step (a prefill chunk, a token, a few tensors of a model being loaded), and so on: several answers
stream side by side, and a Cancel takes effect within one step of the job it names. Requests of one model that are due
for a token have it together, where `edger1.batch` can.

A request that fails answers with Failed and leaves the engine alive; whatever it had reached is dropped with it.
"""

from __future__ import annotations

import collections
import queue
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edger1 import sampling, tool_calls
from edger1.errors import EdgeR1Error, EngineError, UsageError
from edger1.experts.budget import parse_slots
from edger1.memory import PROCESS_BYTES, check_kv_bits, default_ceiling
from edger1.messages import (
    AdapterUsed,
    Cancel,
    Counted,
    CountTokens,
    Event,
    Failed,
    Generate,
    Load,
    Loaded,
    Progress,
    Request,
    RestoreCache,
    SaveCache,
    Score,
    Unload,
    Unloaded,
    UseAdapter,
)

if TYPE_CHECKING:
    from edger1.batch import Batch, Said
    from edger1.generate import Generation
    from edger1.loader import LiveModel

PRECISIONS = ("fast", "exact")
THINK = ("auto", "on", "off")
SPECULATE = ("auto", "off", "lookup", "mtp", "draft")


class Interrupted(Exception):  # noqa: N818
    """The step under way waits for a disk, and nobody wants its result any more."""


class Job(Protocol):
    """A piece of work that goes on a step at a time."""

    def step(self) -> bool:
        """Go one step further; True when finished, all its events sent."""

    def cancel(self) -> None:
        """End here and send the closing event."""

    def drop(self) -> None:
        """End here without a word: the job has failed, or nobody listens any more."""

    def give_way(self) -> None:
        """Forget what was computed, which may be half of a step; it is computed anew if the job goes on."""


Entry = tuple[str, str, Job]
"""A job with its request's id and the model it is for, "" where it is for none."""


class LoadJob:
    """A model being loaded, some tensors a step; it waits for those that were asked for before it.

    One at a time, because what is left of the engine's ceiling is known only when the others are there.
    """

    def __init__(self, scheduler: Scheduler, request: Load) -> None:
        self._scheduler = scheduler
        self._request = request
        self._steps: Generator[tuple[int, int], None, LiveModel] | None = None
        scheduler.loads.append(self)

    def step(self) -> bool:
        """Load the next tensor; sends Loaded at the end."""
        if self._scheduler.loads[0] is not self:
            return False
        try:
            self._steps = self._steps or self._start()
            done, total = next(self._steps)
        except StopIteration as stop:
            self.drop()
            self._scheduler.add_model(self._request, stop.value)
            return True
        self._scheduler.emit(Progress(self._request.id, "load", done, total))
        return False

    def _start(self) -> Generator[tuple[int, int], None, LiveModel]:
        from edger1.loader import load

        self._scheduler.bound_spare_memory(loading=True)
        folder = Path(self._request.folder)
        return load(
            folder.name,
            folder,
            ceiling_bytes=self._scheduler.room(self._request.memory_bytes),
            context=self._request.context,
            precision=self._request.precision,
            expert_slots=self._request.expert_slots,
            adapter=None if self._request.adapter is None else Path(self._request.adapter),
            draft=None if self._request.draft is None else Path(self._request.draft),
            kv_bits=self._request.kv_bits,
        )

    def give_way(self) -> None:
        """Nothing: what was loaded is whole tensors."""

    def cancel(self) -> None:
        """Drop what was loaded."""
        self.drop()
        self._scheduler.emit(Failed(self._request.id, "EngineError", "Loading was cancelled."))

    def drop(self) -> None:
        """Let go of what was loaded, and let the next load begin."""
        self._steps = None
        if self in self._scheduler.loads:
            self._scheduler.loads.remove(self)
            self._scheduler.bound_spare_memory()


class AdapterJob:
    """A change of a model's adapter: it waits for those that were asked for before it, and the later ones for it."""

    def __init__(self, scheduler: Scheduler, model: LiveModel, request: UseAdapter, after: set[str]) -> None:
        self._scheduler, self._model, self._request = scheduler, model, request
        self.after = after
        """Ids of the requests for the model that were asked for before it."""

    def step(self) -> bool:
        """Change the adapter, and say so."""
        from edger1.adapter import use

        folder = self._request.adapter
        self._scheduler.bound_spare_memory(loading=True)
        most = self._scheduler.most_bytes(self._model)
        try:
            use(self._model, None if folder is None else Path(folder), most_bytes=most)
        finally:
            self._scheduler.bound_spare_memory()
        self._scheduler.emit(AdapterUsed(self._request.id, self._request.model, self._model.describe()))
        return True

    def give_way(self) -> None:
        """Nothing: there is no half of it."""

    def cancel(self) -> None:
        """Leave the adapter as it is."""
        self._scheduler.emit(Failed(self._request.id, "EngineError", "Changing the adapter was cancelled."))

    def drop(self) -> None:
        """Nothing: it holds nothing."""


class Scheduler:
    """One engine: its models, its running jobs, and the ceiling they share."""

    def __init__(self, emit: Callable[[Event], None], ceiling_bytes: int | None = None) -> None:
        self.emit = emit
        self._ceiling_bytes = ceiling_bytes
        self._models: dict[str, LiveModel] = {}
        self._jobs: collections.deque[Entry] = collections.deque()
        self._turn: Any = None
        self._batches: dict[str, Batch[Generation]] = {}
        self.loads: list[LoadJob] = []
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        # What came while a step was under way.
        self._early: collections.deque[Request | None] = collections.deque()
        self._under_way: Entry | None = None

    def run(self, inbox: queue.SimpleQueue[Request | None]) -> None:
        """Serve requests until None arrives. This thread owns MLX from here on."""
        self._inbox = inbox
        while True:
            if self._jobs and inbox.empty() and not self._early:
                self._advance()
                continue
            request = self._early.popleft() if self._early else inbox.get()
            if request is None:
                break
            self._handle(request)
        for _, _, job in self._jobs:
            job.drop()
        self._jobs.clear()
        for model in self._models.values():
            model.close()
        if self._models:
            self._models.clear()
            self.bound_spare_memory()
        self._batches.clear()

    def room(self, asked_bytes: int | None) -> int:
        """Bytes that a further model may take: what it was given, within what the engine's others leave."""
        ceiling = self._ceiling_bytes or default_ceiling()
        # The process itself is counted once in every plan, and is there only once.
        taken = sum(m.plan.total_bytes - PROCESS_BYTES for model in self._models.values() for m in model.all_models)
        left = max(0, ceiling - taken)
        if asked_bytes is None:
            return left
        return min(asked_bytes, left) if self._ceiling_bytes or self._models else asked_bytes

    def add_model(self, request: Load, model: LiveModel) -> None:
        """Take a loaded model into service."""
        name = request.id
        self._models[name] = model
        for streaming in model.streamings:
            streaming.interrupted = self._look
        self.bound_spare_memory()
        self.emit(Loaded(request.id, name, model.describe()))

    def bound_spare_memory(self, *, loading: bool = False) -> None:
        """Let the kernels keep of the memory of caches that are gone no more than the plans leave under the ceilings.

        Called whenever a plan has changed. While something is loaded, which may take what is left, nothing is kept.
        """
        from edger1 import kernels

        extension = kernels.extension()
        if extension is None:
            return
        left = [self.most_bytes(m) - m.plan.total_bytes for model in self._models.values() for m in model.all_models]
        extension.keep_spare_rooms(0 if loading or not left else min(left))

    def most_bytes(self, model: LiveModel) -> int:
        """Bytes that a loaded model may take in all: its own ceiling, within what the engine's others leave."""
        ceiling = model.plan.ceiling_bytes
        if not self._ceiling_bytes and len(self._models) < 2:
            return ceiling
        return min(ceiling, model.plan.total_bytes + self.room(None) - PROCESS_BYTES)

    def _handle(self, request: Request) -> None:
        try:
            if isinstance(request, Cancel):
                self._cancel(request.target)
            elif isinstance(request, Unload):
                self._unload(request)
            elif isinstance(request, CountTokens):
                self._count(request)
            else:
                model = "" if isinstance(request, Load) else request.model
                self._jobs.extend((request.id, model, job) for job in self._start(request))
        except Exception as error:
            self._fail(request.id, error)

    def _model(self, name: str) -> LiveModel:
        model = self._models.get(name)
        if model is None:
            raise EngineError(f"No model {name!r} is loaded in this engine; it may have been closed.")
        return model

    def _count(self, request: CountTokens) -> None:
        tokenizer = self._model(request.model).tokenizer
        try:
            request.text.encode()
        except (AttributeError, UnicodeEncodeError):
            raise UsageError(f"{request.text!r:.200} is no text whose tokens can be counted.") from None
        ids = tokenizer.encode(request.text, add_special_tokens=False)
        self.emit(Counted(request.id, len(ids)))

    def _start(self, request: Load | Generate | Score | SaveCache | RestoreCache | UseAdapter) -> Sequence[Job]:
        if isinstance(request, Load):
            _check_load(request)
            return [LoadJob(self, request)]
        model = self._model(request.model)
        if isinstance(request, UseAdapter):
            return [AdapterJob(self, model, request, {id_ for id_, name, _ in self._jobs if name == request.model})]
        if isinstance(request, Score):
            from edger1.score import Scoring

            return [Scoring(model, request, self.emit)]
        if isinstance(request, SaveCache | RestoreCache):
            return [_cache_job(model, request, self.emit)]
        from edger1.generate import Generation

        _check_generate(request)
        self._turn = self._turn or sampling.RandomTurn()
        if request.samples > 1:
            from edger1.samples import Samples

            return Samples(model, request, self.emit, self._turn).jobs
        return [Generation(model, request, self.emit, self._turn)]

    def _advance(self) -> None:
        """Give the job in front one step, with those that are decoded together with it, and put them to the back."""
        while self._waits(self._jobs[0]):
            self._jobs.rotate(-1)
        first = self._jobs[0]
        company = self._company(first)
        if len(company) < 2:
            self._jobs.popleft()
            self._step(first, first[2].step)
            return
        for entry, _ in company:
            self._jobs.remove(entry)
        self._step_together(company)

    def _waits(self, entry: Entry) -> bool:
        """Whether a change of the adapter must come before a job, or jobs before such a change. Never so for all."""
        id_, model, job = entry
        if not any(isinstance(each, AdapterJob) for _, _, each in self._jobs):
            return False
        same = [(other, each) for other, name, each in self._jobs if name == model]
        if isinstance(job, AdapterJob):
            return any(other in job.after for other, _ in same)
        return any(isinstance(each, AdapterJob) and id_ not in each.after for _, each in same)

    def _company(self, first: Entry) -> list[tuple[Entry, Generation]]:
        """Return the jobs whose next token can be decoded together with that of `first`, which is among them."""
        from edger1.generate import Generation

        if not isinstance(first[2], Generation) or not first[2].joins:
            return []
        same = [(e, e[2]) for e in self._jobs if e[1] == first[1] and isinstance(e[2], Generation)]
        return [(entry, job) for entry, job in same if job.joins and not self._waits(entry)]

    def _step(self, entry: Entry, step: Callable[[], bool]) -> None:
        """Go one step with a job that is in no queue, and put it to the back unless it has finished."""
        id_, _, job = entry
        self._under_way = entry
        try:
            finished = step()
        except Interrupted:
            # What ends it is in the inbox, and is served next.
            job.give_way()
            finished = False
        except Exception as error:
            job.drop()
            self._fail(id_, error)
            return
        finally:
            self._under_way = None
        if not finished:
            self._jobs.append(entry)

    def _look(self) -> None:
        """Raise Interrupted where a request has arrived that ends the step under way."""
        while not self._inbox.empty():
            self._early.append(self._inbox.get())
        if self._early and self._under_way is not None:
            id_, model, _ = self._under_way
            if any(_ends(request, id_, model) for request in self._early):
                raise Interrupted

    def _step_together(self, company: list[tuple[Entry, Generation]]) -> None:
        """Give each one token; those that cannot be in the batch have theirs alone."""
        model = company[0][0][1]
        batch = self._batch_of(model)
        try:
            together = batch.choose([job for _, job in company])
            said = {each.row: each for each in batch.step(together)}
        except Exception as error:
            self._batches.pop(model).abandon()
            for entry, job in company:
                job.drop()
                self._fail(entry[0], error)
            return
        entries = {job: entry for entry, job in company}
        complete: list[Generation] = []
        for job in together:
            if job in said:
                self._step(entries[job], partial(_say, said[job], complete))
            else:
                self._jobs.append(entries[job])
        # All of them at once, since whoever leaves has those that stay copied.
        batch.give_back(complete)
        for job in complete:
            self._step(entries[job], partial(_finish, job))
        # Nobody computes ahead alone, or two that are due in turns would never be due together.
        for job in [job for job in entries if job not in together]:
            self._step(entries[job], partial(job.step, ahead=False))

    def _batch_of(self, model: str) -> Batch[Generation]:
        from edger1.batch import Batch
        from edger1.generate import runs_ahead

        if model not in self._batches:
            live = self._models[model]
            self._batches[model] = Batch(live, ahead=runs_ahead(live))
        return self._batches[model]

    def _cancel(self, target: str) -> None:
        for entry in list(self._jobs):
            if entry[0] == target:
                self._jobs.remove(entry)
                try:
                    entry[2].cancel()
                except Exception as error:
                    # Whoever waits for its end has to hear of one, and what it has set aside is given back.
                    self._fail(target, error)
                    entry[2].drop()
        # Where there was none, it has ended already, and said so.

    def _unload(self, request: Unload) -> None:
        for id_, model, _ in list(self._jobs):
            if model == request.model:
                self._cancel(id_)
        self._batches.pop(request.model, None)
        closing = self._models.pop(request.model, None)
        if closing is not None:
            closing.close()
            self.bound_spare_memory()
        self.emit(Unloaded(request.id, request.model))

    def _fail(self, id_: str, error: Exception) -> None:
        if isinstance(error, EdgeR1Error):
            self.emit(Failed(id_, type(error).__name__, str(error)))
            return
        traceback.print_exc(file=sys.stderr)
        self.emit(
            Failed(id_, "EngineError", f"The engine failed inside ({type(error).__name__}: {error}). This is a bug.")
        )


def _ends(request: Request | None, id_: str, model: str) -> bool:
    if isinstance(request, Cancel):
        return request.target == id_
    return request is None or (isinstance(request, Unload) and request.model == model)


def _say(said: Said[Generation], complete: list[Generation]) -> bool:
    """Give a job its token, and note in `complete` if that was the last of its answer."""
    done = said.row.say(said.token, fed=said.fed)
    if done:
        complete.append(said.row)
    return done


def _finish(job: Generation) -> bool:
    job.finish()
    return True


def _cache_job(model: LiveModel, request: SaveCache | RestoreCache, emit: Callable[[Event], None]) -> Job:
    from edger1.cache_jobs import CacheRestoring, CacheSaving

    if isinstance(request, RestoreCache):
        return CacheRestoring(model, request, emit)
    _check_prompt(request)
    return CacheSaving(model, request, emit)


def _check_load(request: Load) -> None:
    if request.precision not in PRECISIONS:
        raise UsageError(f"precision is {request.precision!r}; expected one of {', '.join(PRECISIONS)}.")
    sampling.check_count("context", request.context)
    sampling.check_count("memory", request.memory_bytes)
    if request.expert_slots is not None:
        parse_slots(request.expert_slots)
    check_kv_bits(request.kv_bits)


def _check_prompt(request: Generate | SaveCache) -> None:
    if (request.messages is None) == (request.prompt is None):
        raise UsageError("Give either messages or a prompt, and not both.")
    if request.prompt is not None and not isinstance(request.prompt, str):
        raise UsageError(f"prompt is {request.prompt!r:.200}; expected a string.")
    tool_calls.check_tools(request.tools)
    if request.tools and request.messages is None:
        raise UsageError("Tools are told through the chat template, which a raw prompt leaves out. Give messages.")
    if request.think not in THINK:
        raise UsageError(f"think is {request.think!r}; expected one of {', '.join(THINK)}.")


def _check_generate(request: Generate) -> None:
    _check_prompt(request)
    if request.continue_last and request.messages is None:
        raise UsageError("continue_last goes on from the last of some messages, and there is a prompt instead.")
    if not isinstance(request.context_shift, bool):
        raise UsageError(f"context_shift is {request.context_shift!r:.200}; expected True or False.")
    if request.speculate not in SPECULATE:
        raise UsageError(f"speculate is {request.speculate!r}; expected one of {', '.join(SPECULATE)}.")
    sampling.check(request.sampling)
    sampling.check_stop(request.stop)
    sampling.check_count("max_tokens", request.max_tokens)
    sampling.check_thinking(request)
