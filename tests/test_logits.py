"""Logits a few rows at a time, for every family."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from families import PROMPT, UNBUILDABLE, build, families, relative_error
from mlx_lm.models.cache import make_prompt_cache

from edger1.logits import Logits

WHOLE = {"plamo"}
"""Families whose inner model gives no array of hidden states."""


@pytest.mark.parametrize("family", [name for name in families() if name not in UNBUILDABLE])
def test_pieces_are_the_whole(family: str) -> None:
    model = build(family)
    caches = make_prompt_cache(model)
    whole = model(mx.array([PROMPT]), cache=caches)[0]
    logits = Logits(model)
    kinds = [type(module) for module in model.modules()]
    ours = make_prompt_cache(model)
    pieces = logits.of(mx.array([PROMPT]), ours, 5)
    if family in WHOLE:
        assert pieces is None
        ours = make_prompt_cache(model)
        pieces = logits.of(mx.array([PROMPT]), ours, 5)
    assert pieces is not None
    assert logits.piecewise == (family not in WHOLE)
    found = list(pieces)
    assert [len(piece) for piece in found] == ([12] if family in WHOLE else [5, 5, 2])
    assert relative_error(mx.concatenate(found), whole) < 1e-5
    # The model is left as it was, and its caches hold the tokens once.
    assert [type(module) for module in model.modules()] == kinds
    step = mx.array([[11]])
    assert relative_error(model(step, cache=ours), model(step, cache=caches)) < 1e-5


def test_the_head_sees_a_few_rows_at_a_time() -> None:
    model = build("llama")
    seen: list[int] = []
    kind: Any = type(model.lm_head)

    class Head(kind):  # type: ignore[misc]
        def __call__(self, x: Any) -> Any:
            found = super().__call__(x)
            seen.append(x.shape[1])
            return found if x.shape[1] <= 5 else found + mx.array(float("nan"))

    model.lm_head.__class__ = Head
    pieces = Logits(model).of(mx.array([PROMPT]), make_prompt_cache(model), 5)
    assert pieces is not None
    assert not any(mx.isnan(piece).any() for piece in pieces)
    assert seen == [12, 5, 5, 2]
