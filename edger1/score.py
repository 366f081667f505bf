"""Log-probabilities of given tokens: what evaluation, GRPO and distillation share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from edger1.errors import ContextError, UsageError
from edger1.loader import LiveModel
from edger1.memory import SCORE_ROWS
from edger1.messages import Event, Score, Scores


class Scoring:
    """A Score request being carried out, a chunk of tokens a step, in a KV cache of its own."""

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
        self._caches: list[Any] | None = None
        self._done = 0
        self._logprobs: list[float] = []

    def step(self) -> bool:
        """Score one chunk; returns True when all are scored and Scores has been sent.

        Does nothing while older requests leave no room for the KV cache.
        """
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        if not self._model.kv.hold(self, len(self._request.token_ids)):
            return False
        self._caches = self._caches or make_prompt_cache(self._model.model)
        ids = self._request.token_ids
        # The last token is only a target.
        count = min(self._model.prefill_step, SCORE_ROWS, len(ids) - 1 - self._done)
        chunk = ids[self._done : self._done + count]
        targets = mx.array(ids[self._done + 1 : self._done + count + 1])
        logits = self._model.model(mx.array([chunk]), cache=self._caches)[0].astype(mx.float32)
        picked = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0] - mx.logsumexp(logits, axis=-1)
        self._logprobs.extend(cast(list[float], picked.tolist()))
        self._done += count
        if self._done < len(ids) - 1:
            return False
        self.drop()
        self._emit(Scores(self._request.id, self._logprobs))
        return True

    def give_way(self) -> None:
        """Drop the KV cache for an older request; scoring begins again when it has ended."""
        self._caches, self._done, self._logprobs = None, 0, []

    def drop(self) -> None:
        """Give the KV cache back without a word."""
        self._caches = None
        self._model.kv.release(self)

    def cancel(self) -> None:
        """Stop; what was scored is sent."""
        self.drop()
        self._emit(Scores(self._request.id, self._logprobs))
