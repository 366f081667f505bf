"""One answer, step by step: prefill in chunks, then a token a step.

    prompt -> (what the prefix cache has) + chunks of `prefill_step` tokens -> last prompt token -> token, token, ...

Each call of `step` does one chunk or one token and returns, so that the scheduler can serve others and see a cancel in
between. The prompt's last token is fed apart from the chunks: their logits are then never needed, and MLX, being lazy,
never computes them.

Where Python takes a good part of a token's time (on a GPU, and with small models on a CPU), the next token's graph is
built and started before the last one is read back, so that the device never waits for Python. With large models on a
CPU there is nothing to gain, and the forward pass after the last token would be a waste that is noticed.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edger1 import sampling, thinking_control
from edger1.batch import Batch, batchable
from edger1.cache import Entry
from edger1.errors import ContextError, UsageError
from edger1.experts.figures import Account
from edger1.loader import LiveModel
from edger1.messages import Done, Event, Figures, Generate, Progress, Running, Text, Thought, ToolCall, Usage
from edger1.mlx_runtime import on_gpu
from edger1.prompt import Rendered, render
from edger1.sampling import RandomState, Sampler
from edger1.seam import Detokenizer
from edger1.speculate import Speculation
from edger1.thinking import Splitter
from edger1.thinking_control import Ruling
from edger1.tool_calls import MalformedCallError

# Weights up to which a CPU reads them in some tens of milliseconds.
_SMALL_MODEL_BYTES = 1 << 30

_LOOK_BACK = 64

RUNNING_EVERY_S = 0.5
"""How often an answer tells how it is coming along."""


def peak_memory_bytes() -> int:
    """Peak memory of this process: resident size, or what MLX has allocated where that is more (GPU memory)."""
    import mlx.core as mx

    return max(_peak_resident_bytes(), int(mx.get_peak_memory()))


def _peak_resident_bytes() -> int:
    if sys.platform == "linux":
        # getrusage gives a process the peak of the one that started it, where that was larger.
        with suppress(OSError), Path("/proc/self/status").open(encoding="utf-8", errors="replace") as status:
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass
class _Clock:
    asked: float
    prefill: float = 0.0
    first: float = 0.0
    last: float = 0.0
    # When it was last told how the answer is coming along, and how many tokens there were.
    told: float = 0.0
    told_tokens: int = 0


@dataclass
class _Output:
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    calls: int = 0
    notes: list[str] = field(default_factory=list)


class Generation:
    """A request being answered. `turn` is shared by all requests of an engine."""

    def __init__(self, model: LiveModel, request: Generate, emit: Callable[[Event], None], turn: RandomTurn) -> None:
        self._model = model
        self._request = request
        self._emit = emit
        self._turn = turn
        self._clock = _Clock(asked=time.perf_counter())
        self._output = _Output()

        rendered = render(model, request)
        self._raw = rendered.raw
        self._prompt_text = rendered.text
        self._prompt = self._encode(rendered.text)
        if not self._prompt:
            raise UsageError("The prompt is empty; there is nothing to continue.")
        room = model.context - len(self._prompt)
        if room < 1:
            raise ContextError(
                f"The prompt has {len(self._prompt)} tokens, and the context of {model.context} tokens must hold it "
                f"and the answer. Shorten it, or give a larger context with --context."
            )
        self._max_tokens = min(room, request.max_tokens or room)

        chosen = sampling.resolve(request.sampling, model.sampling)
        self._sampler = Sampler(chosen, model.vocabulary)
        self._random = RandomState.seeded(chosen.seed)
        calls = model.calls.markers if request.tools else ()
        self._splitter = Splitter(model.markers, request.stop, rendered.in_thought, calls=calls, said=rendered.said)
        self._detokenizer = Detokenizer(model.tokenizer, self._prompt if rendered.said else ())
        self._control = self._thinking_control(rendered)
        # Whether what was said last stands otherwise than it was drawn, and how many tokens in the caches do not stand.
        self._overruled = False
        self._excess = 0
        self._run_ahead = runs_ahead(model) and not self._sampler.looks_back
        self._drafts = Speculation(
            model, request.speculate, self._sampler, self._random, turn, seeded=chosen.seed is not None
        )

        self._experts = None if model.streaming is None else Account(model.streaming)
        self._caches: list[Any] | None = None
        self._cached = 0
        # The tokens that are in the caches, out of prompt and answer.
        self._fed: list[int] = []
        self._next: Any = None
        # Where the caches, and the token drawn ahead, are while this request is decoded with others.
        self.batch: Batch[Any] | None = None

    def _thinking_control(self, rendered: Rendered) -> thinking_control.ThinkingControl:
        tokenizer, markers = self._model.tokenizer, self._model.markers
        before = None
        if rendered.said and rendered.in_thought and markers is not None:
            before = thinking_control.thought_in(
                self._prompt, markers.start, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
            )
        return thinking_control.of(
            self._request,
            markers,
            self._splitter,
            lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
            name=self._model.name,
            room=self._max_tokens,
            thought_before=before,
        )

    def _encode(self, text: str) -> list[int]:
        def encode(part: str) -> list[int]:
            return self._model.tokenizer.encode(part, add_special_tokens=self._raw)

        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"U+{ord(text[error.start]):04X}"
            raise UsageError(f"The prompt is no text: it holds half a character ({half}). Give it as UTF-8.") from None
        # Raw text gets its special tokens at its beginning, so it is encoded as a whole.
        if self._raw:
            return encode(text)
        ids = self._model.kv.encode(text, encode)
        if self._request.continue_last:
            end = str(self._model.tokenizer.decode(ids[-_LOOK_BACK:], skip_special_tokens=False)).lstrip()
            if not text.endswith(end):
                # Encoded apart, what comes after a cached text may begin with a blank that is not in it.
                return encode(text)
        return ids

    def step(self, *, ahead: bool = True) -> bool:
        """Do one chunk or one token; returns True when the answer is complete and Done has been sent.

        Without `ahead` no token is computed before the one that is due has been sent. Does nothing while older
        requests leave no room for the KV cache.
        """
        if self._experts is None:
            return self._step(ahead=ahead)
        with self._experts.counting(decoding=self._caches is not None and self._waiting <= 1):
            return self._step(ahead=ahead)

    def _step(self, *, ahead: bool) -> bool:
        self._come_back()
        if self._caches is None and not self._begin():
            return False
        # A token that was drawn ahead has had everything before it fed.
        remaining = self._waiting - (self._next is None)
        drafts = self._choose_drafts() if remaining <= 0 else 0
        drafting = drafts > 0 and self._next is None
        count = min(remaining, self._model.prefill_step) if remaining > 0 else 1 + drafts * drafting
        if not self._model.kv.hold(self, len(self._fed) + count):
            return False
        if remaining > 0:
            self._prefill(self._known()[len(self._fed) : len(self._fed) + count])
            return False
        before = len(self._output.tokens)
        if drafting:
            self._verify()
        else:
            self._decode(ahead=ahead and not drafts)
        self._drafts.end(len(self._output.tokens) - before, drafted=drafting)
        if self._output.finish is None:
            return False
        self.finish()
        return True

    @property
    def tokens_fed(self) -> int:
        """How many tokens are in its caches."""
        return len(self._fed)

    @property
    def last_token(self) -> int:
        """The token that is fed next, where `joins`."""
        return self._output.tokens[-1] if self._output.tokens else self._prompt[-1]

    @property
    def _waiting(self) -> int:
        """How many tokens of the prompt and of what was said are not in the caches."""
        return len(self._prompt) + len(self._output.tokens) - len(self._fed)

    def _known(self) -> list[int]:
        return self._prompt + self._output.tokens

    @property
    def joins(self) -> bool:
        """Whether its next step is a token that can be decoded together with those of other requests."""
        if self.batch is not None:
            return not self._overruled
        if not self._fed or self._caches is None or not batchable(self._model, self._caches):
            return False
        return self._waiting == (self._next is None)

    @property
    def ends_next(self) -> bool:
        """Whether its next token is the last that it may say."""
        return len(self._output.tokens) + 1 >= self._max_tokens

    def lend(self, batch: Batch[Any]) -> tuple[list[Any], Any]:
        """Hand `batch` the caches, and the token drawn ahead, shape (1,), or None; `receive` gives them back."""
        caches, self._caches, self.batch = self._caches, None, batch
        drawn, self._next = self._next, None
        assert caches is not None
        return caches, drawn

    def receive(self, caches: list[Any] | None, drawn: Any) -> None:
        """Take caches and the token drawn ahead back from the batch; no caches where it has dropped them."""
        self._caches, self._next, self.batch = caches, drawn, None
        self._take_back()
        if self._caches is not None:
            self._model.kv.settle(self, len(self._fed) + 1)

    def _come_back(self) -> None:
        if self.batch is not None:
            self.batch.give_back([self])

    def draw(self, *, unread: bool) -> sampling.Draw:
        """Return how its next token is drawn in a batch; the token before that may be `unread` yet."""
        self._turn.pause(self._random)
        tokens = self._known() if self._sampler.looks_back else []
        return self._sampler.draw(tokens, self._random, unread=unread)

    def feed(self) -> None:
        """Note that `last_token` is in its cache, which the batch holds."""
        self._fed.append(self.last_token)

    def say(self, token: int, *, fed: bool) -> bool:
        """Take a token that the batch has drawn, which is `fed` already or not; True when it completes the answer."""
        if fed:
            self._fed.append(token)
        self._add(token)
        return self._output.finish is not None

    def _begin(self) -> bool:
        from mlx_lm.models.cache import make_prompt_cache

        known = self._known()
        taken = self._model.kv.take(self, known)
        if taken is None:
            return False
        caches, shared = taken
        self._caches = self._drafts.begin(caches) or make_prompt_cache(self._model.model)
        self._fed = known[:shared]
        if not self._clock.prefill:
            self._clock.prefill = time.perf_counter()
            self._cached = shared
        return True

    def give_way(self) -> None:
        """Drop the KV cache for an older request; prompt and answer are fed again when it has ended."""
        import mlx.core as mx

        self._let_go()
        if self._next is not None:
            mx.eval(self._next)
        self._fed = []

    def drop(self) -> None:
        """Give the KV cache back without a word."""
        self._let_go()
        self._model.kv.release(self)

    def _let_go(self) -> None:
        if self.batch is not None:
            self.batch.remove(self)
        self._caches = None
        self._drafts.drop()

    def cancel(self) -> None:
        """End the answer here; what was generated stands."""
        self._output.finish = "cancelled"
        self._come_back()
        self.finish()

    def _prefill(self, chunk: list[int]) -> None:
        import mlx.core as mx

        assert self._caches is not None
        self._drafts.forward(mx.array([chunk]), self._caches, len(self._fed), self._known())
        mx.eval([cache.state for cache in self._caches])
        self._fed.extend(chunk)
        if not self._output.tokens:
            total = len(self._prompt) - self._cached
            self._emit(Progress(self._request.id, "prefill", len(self._fed) - self._cached, total))

    def _forward(self, tokens: Any, position: int) -> Any:
        """Feed `tokens` (1, 1) at `position` and draw the next one; returns its id, shape (1,), not yet evaluated."""
        assert self._caches is not None
        logits = self._drafts.forward(tokens, self._caches, position, self._known())[:, -1, :]
        self._turn.take(self._random)
        return self._sampler(logits, self._known() if self._sampler.looks_back else [])

    def _decode(self, *, ahead: bool) -> None:
        import mlx.core as mx

        if self._next is None:
            last = self.last_token
            self._fed.append(last)
            self._next = self._forward(mx.array([[last]]), len(self._fed) - 1)
        current, self._next = self._next, None
        ahead = ahead and self._run_ahead and len(self._output.tokens) + 1 < self._max_tokens
        if ahead:
            self._next = self._forward(current[None], len(self._fed))
            mx.async_eval(self._next)
        token = int(current.item())
        if self._model.streaming is not None:
            # Nothing is said that was computed on a file which is gone.
            self._model.streaming.let_go()
        if ahead:
            self._fed.append(token)
        self._add(token)
        self._take_back()

    def _choose_drafts(self) -> int:
        """Return how many drafts the next step verifies, or the one after it where a token was drawn ahead."""
        assert self._caches is not None
        unread = self._next is not None
        room = self._max_tokens - len(self._output.tokens) - 1 - unread
        if self._control.left is not None:
            # The last draft that stands has one token more behind it.
            room = min(room, self._control.left - 1 - unread)
        return self._drafts.choose(self._known(), self._caches, room, unread=unread)

    def _verify(self) -> None:
        """Say the drafts that stand and one token more, up to where the answer ends."""
        assert self._caches is not None
        before = len(self._fed)
        said = self._drafts.step(self._known(), self._caches)
        for streaming in self._model.streamings:
            streaming.let_go()
        for token in said:
            if self._output.finish is not None or self._overruled:
                break
            self._fed.append(self.last_token)
            self._add(token)
        self._drafts.settle(len(self._fed), self._caches, len(self._fed) - before)
        # That has trimmed the caches to what stands.
        self._excess = 0
        self._take_back()

    def _add(self, token: int) -> None:
        clock = self._clock
        clock.last = time.perf_counter()
        if not self._output.tokens:
            clock.first = clock.told = clock.last
            clock.told_tokens = 1
        self._output.tokens.append(token)
        self._publish(token)
        if clock.last - clock.told >= RUNNING_EVERY_S and self._output.finish is None:
            self._tell()

    def _tell(self) -> None:
        """Say how the answer is coming along."""
        clock, said, watch = self._clock, len(self._output.tokens), self._model.watch
        # Tokens may have been taken back.
        rate = max(0, said - clock.told_tokens) / (clock.last - clock.told)
        clock.told, clock.told_tokens = clock.last, said
        figures = replace(self._figures(by_layer=False), decode_tokens_per_s=rate)
        self._emit(Running(self._request.id, figures, None if watch is None else watch.layers()))

    def _publish(self, token: int) -> None:
        ends = token in self._model.tokenizer.eos_token_ids
        text = "" if ends else self._detokenizer.add(token)
        ruling = self._control.overrules(text, ends=ends)
        if ruling is None:
            if ends:
                self._output.finish = "stop"
                return
            self._say_text(text)
            ruling = self._closing()
        if ruling is not None:
            self._overrule(ruling)

    def _say_text(self, text: str) -> None:
        """Send the text of a token that has been added."""
        self._send(self._splitter.feed(text))
        self._control.note(text)
        if self._splitter.stopped:
            self._output.finish = "stop"
        elif len(self._output.tokens) >= self._max_tokens:
            self._output.finish = "length"

    def _closing(self) -> Ruling | None:
        return self._control.closes(self._output.tokens) if self._output.finish is None else None

    def _overrule(self, ruling: Ruling) -> None:
        """Say what is to stand in the place of what the model has drawn; it is fed as a prompt is."""
        output = self._output
        if ruling.dropped:
            del output.tokens[-ruling.dropped :]
            self._excess += max(0, len(self._fed) - len(self._known()))
            del self._fed[len(self._known()) :]
            self._detokenizer = Detokenizer(self._model.tokenizer, self._known())
            self._splitter.let_go()
            self._send(self._splitter.feed(ruling.keep))
        skip = ruling.skip
        closing: Ruling | None = None
        for token in ruling.forced:
            output.tokens.append(token)
            text = self._detokenizer.add(token)
            self._say_text(text[skip:])
            skip = max(0, skip - len(text))
            closing = self._closing()
            if output.finish is not None or closing is not None:
                break
        else:
            self._control.closed()
        self._overruled = True
        self._turn.pause(self._random)
        self._random.restart(len(output.tokens))
        if closing is not None:
            self._overrule(closing)

    def _take_back(self) -> None:
        """Take out of the caches what does not stand, and forget what was drawn behind it."""
        overruled, excess = self._overruled, self._excess
        self._overruled, self._excess = False, 0
        if not overruled or self._caches is None:
            return
        self._next = None
        if not self._drafts.back(self._caches, excess, len(self._fed)):
            # All of it is fed again.
            self._let_go()
            self._fed = []

    def _send(self, segments: list[tuple[str, str]]) -> None:
        for kind, text in segments:
            if kind == "call":
                self._call(text)
                continue
            if kind == "cut":
                self._output.notes.append("The answer ended in the middle of a tool call, which stands in the text.")
            self._emit(Thought(self._request.id, text) if kind == "thought" else Text(self._request.id, text))

    def _call(self, block: str) -> None:
        try:
            calls = self._model.calls.read(block, self._request.tools)
        except MalformedCallError as error:
            self._output.notes.append(f"A tool call cannot be read ({error}); it stands in the text.")
            self._emit(Text(self._request.id, block))
            return
        self._output.calls += len(calls)
        for call in calls:
            self._emit(ToolCall(self._request.id, call["name"], call["arguments"], call["id"]))

    def finish(self) -> None:
        """Send what is left of a complete answer, and Done; the caches are kept for prompts that go on from it."""
        output = self._output
        self._send(self._splitter.feed(self._detokenizer.end()))
        self._send(self._splitter.finish(whole=output.finish == "stop"))
        if self._splitter.stopped and output.finish == "length":
            # The stop string's last character waited for a token that did not come.
            output.finish = "stop"
        self._keep_cache()
        output.notes += self._control.told(full=output.finish == "length")
        finish = "tools" if output.calls and output.finish == "stop" else output.finish or "stop"
        self._emit(Done(self._request.id, finish, usage=self._usage(), figures=self._figures(), notes=output.notes))

    def _keep_cache(self) -> None:
        self._model.kv.release(self)
        if self._fed and self._caches is not None:
            caches = self._drafts.leave(self._caches, len(self._fed))
            text = "" if self._raw else self._fed_text()
            drawn = self._known()[len(self._fed) :] if len(self._fed) >= len(self._prompt) else []
            said = str(self._model.tokenizer.decode(drawn, skip_special_tokens=False)) if text and drawn else ""
            self._model.kv.put(Entry(self._fed, text, caches, drawn, said))
        self._caches = None

    def _fed_text(self) -> str:
        decode = self._model.tokenizer.decode
        if len(self._fed) >= len(self._prompt):
            return self._prompt_text + str(decode(self._fed[len(self._prompt) :], skip_special_tokens=False))
        text = str(decode(self._fed, skip_special_tokens=False))
        # Not every tokenizer gives back what it was given; the ids alone serve then.
        return text if self._prompt_text.startswith(text) else ""

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            prefilled_tokens=max(0, min(len(self._fed), len(self._prompt)) - self._cached),
            completion_tokens=len(self._output.tokens),
            thought_tokens=self._control.thought_tokens,
        )

    def _figures(self, *, by_layer: bool = True) -> Figures:
        clock, usage = self._clock, self._usage()
        decoded = len(self._output.tokens) - 1
        # One token is always fed, to draw the first from; that is no prefill.
        prefilled = clock.first and usage.prefilled_tokens > 1
        return Figures(
            prefill_tokens_per_s=usage.prefilled_tokens / (clock.first - clock.prefill) if prefilled else None,
            decode_tokens_per_s=decoded / (clock.last - clock.first) if decoded > 0 else None,
            time_to_first_token_s=clock.first - clock.asked if clock.first else None,
            peak_memory_bytes=peak_memory_bytes(),
            accounted_memory_bytes=self._model.accounted_bytes,
            ceiling_bytes=self._model.plan.ceiling_bytes,
            context_used=len(self._prompt) + len(self._output.tokens),
            context_size=self._model.context,
            experts=None
            if self._experts is None
            else self._experts.summary(usage.prefilled_tokens, max(0, decoded), by_layer=by_layer),
            drafts=self._drafts.figures(),
        )


def runs_ahead(model: LiveModel) -> bool:
    """Whether a token's graph is worth building before the one before it is known."""
    if model.streaming is not None and not model.streaming.complete:
        # The forward pass after the last token would read experts for nothing.
        return False
    return on_gpu() or model.plan.resident_bytes <= _SMALL_MODEL_BYTES


class RandomTurn:
    """Which request's random state MLX holds at the moment; one for an engine."""

    def __init__(self) -> None:
        self._holder: RandomState | None = None

    def take(self, state: RandomState) -> None:
        """Make `state` the one that the next draw uses."""
        state.enter(self._holder)
        self._holder = state

    def pause(self, state: RandomState) -> None:
        """Take `state` back from MLX if that holds it, for a draw of its own."""
        if self._holder is state:
            state.leave()
            self._holder = None
