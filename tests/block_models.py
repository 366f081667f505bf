"""What the tests of blocks share: running a model with the kernels, greedily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from edger1.kernels.install import Installed, install

PROMPT = [3, 17, 99, 150, 42, 7, 180, 61, 3, 88, 120, 5]
TOLERANCE = 1e-5
"""Relative error of what exact kernels compute."""


@contextmanager
def installed(model: Any, precision: str = "exact", *, fuse: bool = True) -> Iterator[Installed]:
    state = install(model, precision, fuse=fuse)
    try:
        yield state
    finally:
        state.uninstall()


def greedy(model: Any, count: int, caches: Any = None, prompt: list[int] | None = None) -> tuple[list[int], Any]:
    """The tokens, and every step's logits."""
    caches = caches if caches is not None else make_prompt_cache(model)
    x, tokens, logits = mx.array([PROMPT if prompt is None else prompt]), [], []
    for _ in range(count):
        logits.append(model(x, cache=caches)[:, -1, :])
        tokens.append(int(mx.argmax(logits[-1], -1).item()))
        x = mx.array([tokens[-1:]])
    return tokens, mx.concatenate(logits)
