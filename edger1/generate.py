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

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from edger1 import sampling, thinking_control
from edger1.accounting import peak_memory_bytes
from edger1.answer_clock import AnswerClock
from edger1.batch import Batch, batchable
from edger1.cache import Entry, common_prefix
from edger1.context_shift import ContextShift
from edger1.errors import ContextError, UsageError
from edger1.experts.figures import Account
from edger1.loader import LiveModel
from edger1.messages import Done, Event, Figures, Generate, Message, Progress, Running, Usage
from edger1.mlx_runtime import on_gpu
from edger1.prompt import Rendered, encode, render
from edger1.said import Said
from edger1.sampling import RandomState, RandomTurn, Sampler
from edger1.seam import Detokenizer
from edger1.speculate import Speculation
from edger1.thinking import Splitter
from edger1.thinking_control import Ruling

# Weights up to which a CPU reads them in some tens of milliseconds.
_SMALL_MODEL_BYTES = 1 << 30

_LOOK_BACK = 64

RUNNING_EVERY_S = 0.5
"""How often an answer tells how it is coming along."""


class Generation:
    """A request being answered. `turn` is shared by all requests of an engine."""

    def __init__(self, model: LiveModel, request: Generate, emit: Callable[[Event], None], turn: RandomTurn) -> None:
        self._model = model
        self._request = request
        self._emit = emit
        self._turn = turn
        self._clock = AnswerClock()

        rendered = render(model, request)
        self._raw = rendered.raw
        self._prompt_text = rendered.text
        self._prompt = self._encode(rendered)
        if not self._prompt:
            raise UsageError("The prompt is empty; there is nothing to continue.")
        self._shift = _shift(model, request) if request.context_shift else None
        if self._shift is not None:
            self._prompt = self._shift.fit(self._prompt, request.max_tokens)
        room = model.context - len(self._prompt)
        if room < 1:
            raise ContextError(
                f"The prompt has {len(self._prompt)} tokens, and the context of {model.context} tokens must hold it "
                f"and the answer. Shorten it, give a larger context with --context, or let its oldest turns go with "
                f"--context-shift."
            )
        # Whose context shifts may go on for ever.
        most = room if self._shift is None else request.max_tokens or model.context
        most = min(most, request.max_tokens or most)
        # What comes before the answer, and how much of the answer is in that: what it had when the context was full.
        self._before, self._said_before = self._prompt, 0

        chosen = sampling.resolve(request.sampling, model.sampling)
        self._sampler = Sampler(chosen, model.vocabulary)
        self._random = RandomState.seeded(chosen.seed)
        calls = model.calls.markers if request.tools else ()
        splitter = Splitter(model.markers, request.stop, rendered.in_thought, calls=calls, said=rendered.said)
        detokenizer = Detokenizer(model.tokenizer, self._prompt if rendered.said else ())
        self._control = self._thinking_control(rendered, splitter, most)
        self._said = Said(request, emit, model.calls, splitter, detokenizer, self._control, most)
        self._close_at_once()
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

    def _thinking_control(self, rendered: Rendered, splitter: Splitter, most: int) -> thinking_control.ThinkingControl:
        tokenizer, markers = self._model.tokenizer, self._model.markers
        before = None
        if rendered.said and rendered.in_thought and markers is not None:
            before = thinking_control.thought_in(
                self._prompt, markers.start, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
            )
        return thinking_control.of(
            self._request,
            markers,
            splitter,
            lambda text: list(tokenizer.encode(text, add_special_tokens=False)),
            name=self._model.name,
            room=most,
            thought_before=before,
        )

    def _close_at_once(self) -> None:
        """Close the thought that the prompt has opened in the prompt too, where none is to follow."""
        ruling = self._control.closes(())
        if ruling is None:
            return
        text = str(self._model.tokenizer.decode(ruling.forced, skip_special_tokens=False))
        # In place: it is the same list wherever it is held.
        self._prompt += ruling.forced
        self._prompt_text += text
        self._said.splitter.feed(text)
        self._control.note(text)
        self._control.closed()
        room = self._model.context - len(self._prompt)
        if self._shift is None:
            self._said.most = min(self._said.most, room)
        if room < 1:
            raise ContextError(
                f"The prompt has {len(self._prompt)} tokens with the end of its thought, and the context of "
                f"{self._model.context} tokens must hold it and the answer. Give a larger context with --context."
            )

    def _encode(self, rendered: Rendered) -> list[int]:
        ids = encode(self._model, rendered)
        if self._request.continue_last:
            end = str(self._model.tokenizer.decode(ids[-_LOOK_BACK:], skip_special_tokens=False)).lstrip()
            if not rendered.text.endswith(end):
                # Encoded apart, what comes after a cached text may begin with a blank that is not in it.
                return list(self._model.tokenizer.encode(rendered.text, add_special_tokens=False))
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
        if self._shift is not None and self._length >= self._model.context:
            self._go_on(self._shift)
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
        before = len(self._said.tokens)
        if drafting:
            self._verify()
        else:
            self._decode(ahead=ahead and not drafts)
        self._drafts.end(len(self._said.tokens) - before, drafted=drafting)
        if self._said.finish is None:
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
        return self._said.tokens[-1] if self._said.tokens else self._prompt[-1]

    @property
    def _waiting(self) -> int:
        """How many tokens of the prompt and of what was said are not in the caches."""
        return self._length - len(self._fed)

    @property
    def _length(self) -> int:
        return len(self._before) + len(self._said.tokens) - self._said_before

    @property
    def _left(self) -> int:
        """How many tokens it may say before it ends or the context is full."""
        return min(self._said.most - len(self._said.tokens), self._model.context - self._length)

    def _known(self) -> list[int]:
        return self._before + self._said.tokens[self._said_before :]

    @property
    def joins(self) -> bool:
        """Whether its next step is a token that can be decoded together with those of other requests."""
        if self._shift is not None and self._left < 2:
            # What is dropped is dropped alone, and before that a batch would be a token ahead.
            return False
        if self.batch is not None:
            return not self._overruled
        if not self._fed or self._caches is None or not batchable(self._model, self._caches):
            return False
        return self._waiting == (self._next is None)

    @property
    def ends_next(self) -> bool:
        """Whether its next token is the last that it may say."""
        return self._left <= 1

    def lend(self, batch: Batch[Any]) -> tuple[list[Any], Any]:
        """Hand `batch` the caches, and the token drawn ahead, shape (1,), or None; `receive` gives them back."""
        self._drafts.lend()
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
        return self._said.finish is not None

    def _go_on(self, shift: ContextShift) -> None:
        """Drop what is in the middle of a full context, and feed again what comes after it."""
        import mlx.core as mx
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        self._before, inside = shift.go_on(self._before, self._said.tokens[self._said_before :])
        if inside:
            self._said_before = len(self._said.tokens)
        if self._next is not None:
            mx.eval(self._next)
        same = common_prefix(self._fed, self._known())
        if self._caches is not None and can_trim_prompt_cache(self._caches):
            trim_prompt_cache(self._caches, len(self._fed) - same)
        else:
            self._caches, same = None, 0
        self._fed = self._fed[:same]
        self._drafts.drop()

    def _begin(self) -> bool:
        known = self._known()
        taken = self._model.kv.take(self, known)
        if taken is None:
            return False
        caches, shared = taken
        self._caches = self._drafts.begin(caches) or self._model.new_caches()
        self._fed = known[:shared]
        if self._clock.begin():
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
        self._said.finish = "cancelled"
        self._come_back()
        self.finish()

    def _prefill(self, chunk: list[int]) -> None:
        import mlx.core as mx

        assert self._caches is not None
        self._drafts.forward(mx.array([chunk]), self._caches, len(self._fed), self._known())
        mx.eval([cache.state for cache in self._caches])
        self._fed.extend(chunk)
        if not self._said.tokens:
            total = len(self._prompt) - self._cached
            self._emit(Progress(self._request.id, "prefill", len(self._fed) - self._cached, total))

    def _forward(self, tokens: Any, position: int) -> Any:
        """Feed `tokens` (1, 1) at `position` and draw the next one; returns its id, shape (1,), not yet evaluated."""
        assert self._caches is not None
        known = self._known() if self._drafts.observes else []
        logits = self._drafts.forward(tokens, self._caches, position, known)[:, -1, :]
        self._turn.take(self._random)
        return self._sampler(logits, self._known() if self._sampler.looks_back else [])

    def _decode(self, *, ahead: bool) -> None:
        import mlx.core as mx

        if self._next is None:
            last = self.last_token
            self._fed.append(last)
            self._next = self._forward(mx.array([[last]]), len(self._fed) - 1)
        current, self._next = self._next, None
        ahead = ahead and self._run_ahead and self._left > 1
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
        room = self._left - 1 - unread
        if self._control.left is not None:
            # The last draft that stands has one token more behind it.
            room = min(room, self._control.left - 1 - unread)
        known = [] if self._drafts.off else self._known()
        return self._drafts.choose(known, self._caches, room, unread=unread)

    def _verify(self) -> None:
        """Say the drafts that stand and one token more, up to where the answer ends."""
        assert self._caches is not None
        before = len(self._fed)
        said = self._drafts.step(self._known(), self._caches)
        for streaming in self._model.streamings:
            streaming.let_go()
        for token in said:
            if self._said.finish is not None or self._overruled:
                break
            self._fed.append(self.last_token)
            self._add(token)
        self._drafts.settle(len(self._fed), self._caches, len(self._fed) - before)
        # That has trimmed the caches to what stands.
        self._excess = 0
        self._take_back()

    def _add(self, token: int) -> None:
        self._clock.add(first=not self._said.tokens)
        self._said.tokens.append(token)
        self._publish(token)
        if self._clock.since_told() >= RUNNING_EVERY_S and self._said.finish is None:
            self._tell()

    def _tell(self) -> None:
        """Say how the answer is coming along."""
        watch, rate = self._model.watch, self._clock.tell(len(self._said.tokens))
        figures = replace(self._figures(by_layer=False), decode_tokens_per_s=rate)
        self._emit(Running(self._request.id, figures, None if watch is None else watch.layers()))

    def _publish(self, token: int) -> None:
        ends = token in self._model.tokenizer.eos_token_ids
        text = "" if ends else self._said.detokenizer.add(token)
        ruling = self._control.overrules(text, ends=ends)
        if ruling is None:
            if ends:
                self._said.finish = "stop"
                return
            self._said.add_text(text)
            ruling = self._said.closing()
        if ruling is not None:
            self._overrule(ruling)

    def _overrule(self, ruling: Ruling) -> None:
        """Say what is to stand in the place of what the model has drawn; it is fed as a prompt is."""
        said = self._said
        if ruling.dropped:
            del said.tokens[-ruling.dropped :]
            cut = self._said_before - len(said.tokens)
            if cut > 0:
                # Some of it stood before a place at which the context was full.
                self._before = self._before[:-cut]
                self._said_before -= cut
            self._excess += max(0, len(self._fed) - len(self._known()))
            del self._fed[len(self._known()) :]
            said.detokenizer = Detokenizer(self._model.tokenizer, self._known())
            said.splitter.let_go()
            said.send(said.splitter.feed(ruling.keep))
        skip = ruling.skip
        closing: Ruling | None = None
        for token in ruling.forced:
            said.tokens.append(token)
            text = said.detokenizer.add(token)
            said.add_text(text[skip:])
            skip = max(0, skip - len(text))
            closing = said.closing()
            if said.finish is not None or closing is not None:
                break
        else:
            self._control.closed()
        self._overruled = True
        self._turn.pause(self._random)
        self._random.restart(len(said.tokens))
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

    def finish(self) -> None:
        """Send what is left of a complete answer, and Done; the caches are kept for prompts that go on from it."""
        said = self._said
        said.send(said.splitter.feed(said.detokenizer.end()))
        told = said.note_full(self._shift, self._model.context)
        said.end()
        self._keep_cache()
        said.notes += self._control.told(full=said.finish == "length" and not told)
        self._emit(Done(self._request.id, said.reason, usage=self._usage(), figures=self._figures(), notes=said.notes))

    def _keep_cache(self) -> None:
        self._model.kv.release(self)
        if self._fed and self._caches is not None:
            caches, self._caches = self._drafts.leave(self._caches, len(self._fed)), None
            if self._shift is not None and self._shift.times:
                self._prompt_text = self._shift.text
            text = "" if self._raw or not self._prompt_text else self._fed_text()
            drawn = self._known()[len(self._fed) :] if len(self._fed) >= len(self._before) else []
            said = str(self._model.tokenizer.decode(drawn, skip_special_tokens=False)) if text and drawn else ""
            self._model.kv.put(Entry(self._fed, text, caches, drawn, said))
        self._caches = None

    def _fed_text(self) -> str:
        decode = self._model.tokenizer.decode
        if len(self._fed) >= len(self._before):
            return self._prompt_text + str(decode(self._fed[len(self._before) :], skip_special_tokens=False))
        text = str(decode(self._fed, skip_special_tokens=False))
        # Not every tokenizer gives back what it was given; the ids alone serve then.
        return text if self._prompt_text.startswith(text) else ""

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self._prompt),
            cached_tokens=self._cached,
            # What speaks has read all of it, though it may have dropped some since.
            prefilled_tokens=max(
                0, (len(self._prompt) if self._said.tokens else min(len(self._fed), len(self._prompt))) - self._cached
            ),
            completion_tokens=len(self._said.tokens),
            thought_tokens=self._control.thought_tokens,
        )

    def _figures(self, *, by_layer: bool = True) -> Figures:
        clock, usage = self._clock, self._usage()
        decoded = len(self._said.tokens) - 1
        return Figures(
            prefill_tokens_per_s=clock.prefill_rate(usage.prefilled_tokens),
            decode_tokens_per_s=clock.decode_rate(decoded),
            time_to_first_token_s=clock.first_token_s,
            peak_memory_bytes=peak_memory_bytes(),
            accounted_memory_bytes=self._model.accounted_bytes,
            ceiling_bytes=self._model.plan.ceiling_bytes,
            context_used=self._length,
            context_size=self._model.context,
            experts=None
            if self._experts is None
            else self._experts.summary(usage.prefilled_tokens, max(0, decoded), by_layer=by_layer),
            drafts=self._drafts.figures(),
        )


def _shift(model: LiveModel, request: Generate) -> ContextShift:
    def encoded(messages: list[Message]) -> tuple[str, list[int]]:
        rendered = render(model, replace(request, messages=messages))
        return rendered.text, encode(model, rendered)

    return ContextShift(model.context, request.messages, encoded)


def runs_ahead(model: LiveModel) -> bool:
    """Whether a token's graph is worth building before the one before it is known."""
    if model.streaming is not None and not model.streaming.complete:
        # The forward pass after the last token would read experts for nothing.
        return False
    return on_gpu() or model.plan.resident_bytes <= _SMALL_MODEL_BYTES
