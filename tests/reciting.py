"""A model that says what a function tells it to, by the tokens that are in its KV caches and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from edger1.engine import Scheduler

Recital = Callable[[list[int]], int]
"""The token that follows some tokens."""


class Reciting(nn.Module):
    """Its keys are the tokens themselves: caches that hold others than were said make it say other things."""

    def __init__(self, recital: Recital, vocabulary: int) -> None:
        super().__init__()
        self.layers: list[Any] = []
        self._recital, self._vocabulary = recital, vocabulary

    def make_cache(self) -> list[Any]:
        from mlx_lm.models.cache import KVCache

        return [KVCache()]

    def __call__(self, tokens: mx.array, cache: Sequence[Any]) -> mx.array:
        keys = tokens.astype(mx.float32)[:, None, :, None]
        history = np.array(cache[0].update_and_fetch(keys, keys)[0])[0, 0, :, 0].astype(int).tolist()
        logits = np.zeros((1, tokens.shape[1], self._vocabulary), np.float32)
        for i in range(tokens.shape[1]):
            logits[0, i, self._recital(history[: len(history) - tokens.shape[1] + i + 1])] = 50
        return mx.array(logits)


def recite(monkeypatch: pytest.MonkeyPatch, recital: Callable[[Any, list[int]], int]) -> None:
    """Let every model that is loaded from here on recite; `recital` gets its tokenizer and the tokens."""
    add = Scheduler.add_model

    def replaced(self: Scheduler, request: Any, model: Any) -> None:
        model.model = Reciting(lambda tokens: recital(model.tokenizer, tokens), model.vocabulary)
        add(self, request, model)

    monkeypatch.setattr(Scheduler, "add_model", replaced)
