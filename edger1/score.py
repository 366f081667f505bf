"""Log-probabilities of given tokens: what GRPO and distillation share."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, cast

from edger1.accounting import peak_memory_bytes
from edger1.errors import ContextError, UsageError
from edger1.experts.figures import Account
from edger1.loader import LiveModel
from edger1.logits import Logits
from edger1.memory import SCORE_ROWS
from edger1.messages import Event, Failed, Figures, Score, Scores


class Scoring:
    """A Score request being carried out, a prefill step of tokens a step, in a KV cache of its own."""

    def __init__(self, model: LiveModel, request: Score, emit: Callable[[Event], None]) -> None:
        ids: Any = request.token_ids
        whole = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or len(ids) < 2:
            raise UsageError("token_ids must be a list of at least two whole numbers.")
        if outside := [i for i in ids if not 0 <= i < model.vocabulary]:
            raise UsageError(f"token id {outside[0]} is outside the vocabulary of {model.vocabulary} tokens.")
        if len(ids) > model.context:
            raise ContextError(f"There are {len(ids)} tokens to score, and the context holds {model.context}.")
        self._model = model
        self._request = request
        self._emit = emit
        self._logits = Logits(model.model)
        self._experts = None if model.streaming is None else Account(model.streaming)
        self._caches: list[Any] | None = None
        self._done = 0
        self._spent_s = 0.0
        self._logprobs: list[float] = []

    def step(self) -> bool:
        """Score one chunk; returns True when all are scored and Scores has been sent.

        Does nothing while older requests leave no room for the KV cache.
        """
        if not self._model.kv.hold(self, len(self._request.token_ids)):
            return False
        began = time.perf_counter()
        with contextlib.nullcontext() if self._experts is None else self._experts.counting(decoding=False):
            self._score_chunk()
        self._spent_s += time.perf_counter() - began
        if self._done < len(self._request.token_ids) - 1:
            return False
        self.drop()
        self._send()
        return True

    def _score_chunk(self) -> None:
        import mlx.core as mx

        self._caches = self._caches or self._model.new_caches()
        ids = self._request.token_ids
        rows = self._model.prefill_step
        if not self._logits.piecewise:
            rows = min(rows, SCORE_ROWS)
        # The last token is only a target.
        count = min(rows, len(ids) - 1 - self._done)
        pieces = self._logits.of(mx.array([ids[self._done : self._done + count]]), self._caches, SCORE_ROWS)
        if pieces is None:
            # Scored anew from the beginning: this shows at the first chunk.
            self.give_way()
            return
        if self._model.streaming is not None:
            # Nothing is told that was computed on a file which is gone.
            self._model.streaming.let_go()
        for piece in pieces:
            logits = piece.astype(mx.float32)
            targets = mx.array(ids[self._done + 1 : self._done + 1 + len(logits)])
            picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
            self._logprobs.extend(cast(list[float], picked.tolist()))
            self._done += len(logits)

    def give_way(self) -> None:
        """Drop the KV cache for an older request; scoring begins again when it has ended."""
        self._caches, self._done, self._logprobs = None, 0, []

    def drop(self) -> None:
        """Give the KV cache back without a word."""
        self._caches = None
        self._model.kv.release(self)

    def cancel(self) -> None:
        """Stop; a part of the scores could be taken for all of them, so none are sent."""
        self.drop()
        self._emit(Failed(self._request.id, "EngineError", "Scoring was cancelled."))

    def _send(self) -> None:
        figures = Figures(
            prefill_tokens_per_s=self._done / self._spent_s if self._spent_s else None,
            peak_memory_bytes=peak_memory_bytes(),
            accounted_memory_bytes=self._model.accounted_bytes,
            context_used=len(self._request.token_ids),
            context_size=self._model.context,
            experts=None if self._experts is None else self._experts.summary(self._done, 0),
        )
        self._emit(Scores(self._request.id, self._logprobs, figures))
