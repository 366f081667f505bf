"""Drawing a token in one operation, against mlx-lm's samplers on MLX's own operations."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_repetition_penalty, make_sampler

from edger1 import kernels

extension: Any = kernels._load()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the kernels are not built")


@pytest.fixture(autouse=True)
def _no_compile() -> Any:
    # mlx-lm's samplers are compiled functions, on a CPU by g++ at run time.
    mx.disable_compile()
    yield
    mx.enable_compile()


def key_of(seed: int) -> int:
    return int(extension.split_key(seed)[1])


def kept(logits: mx.array, top_p: float, min_p: float, top_k: int) -> set[int]:
    """What mlx-lm's filters leave of a row, one after another."""
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if 0 < top_p < 1:
        logs = apply_top_p(logs, top_p)
    if min_p:
        logs = apply_min_p(logs, min_p)
    if top_k:
        logs = apply_top_k(logs, top_k)
    return set(np.flatnonzero(np.isfinite(np.array(logs)[0])).tolist())


def drawn(logits: mx.array, seeds: range, temperature: float, **filters: float) -> list[int]:
    found = [
        extension.draw_token(logits, key_of(seed), inverse_temperature=1 / temperature, **filters) for seed in seeds
    ]
    return mx.concatenate(found).tolist()


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 5000),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.0, 0.1, 0.5, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    top_k=st.sampled_from([0, 1, 40, 1000]),
)
def test_a_seed_draws_what_mlx_lm_draws(
    n: int, seed: int, spread: float, temperature: float, top_p: float, min_p: float, top_k: int
) -> None:
    logits = mx.random.normal((1, n), key=mx.random.key(seed)) * spread
    top_k = top_k if top_k < n else 0
    filters = {"top_p": top_p, "min_p": min_p, "top_k": top_k}
    sampler = make_sampler(temp=temperature, **filters)
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    same = 0
    for other in range(5):
        mx.random.seed(seed + other)
        expected = int(sampler(logs).item())
        following, key = extension.split_key(seed + other)
        state: Any = mx.random.state
        assert state[0].tolist() == [following >> 32, following & 0xFFFFFFFF]
        found = int(extension.draw_token(logits, key, inverse_temperature=1 / temperature, **filters).item())
        same += found == expected
    # A sum of thousands of float probabilities may round to the other side of a random number that is close.
    assert same >= (5 if n < 500 else 4)


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 30.0])
@pytest.mark.parametrize(
    ("top_p", "min_p", "top_k"),
    [(0.9, 0.0, 0), (0.0, 0.1, 0), (0.0, 0.0, 12), (0.95, 0.02, 20), (0.99999, 0.0, 0), (1e-9, 0.0, 0)],
)
def test_only_what_the_filters_keep_is_drawn_and_all_of_it(
    spread: float, top_p: float, min_p: float, top_k: int
) -> None:
    logits = mx.random.normal((1, 60), key=mx.random.key(3)) * spread
    expected = kept(logits, top_p, min_p, top_k)
    # At a high temperature what is kept is drawn about evenly.
    found = set(drawn(logits, range(1500), 1e4, top_p=top_p, min_p=min_p, top_k=top_k))
    if spread == 0 and top_k:
        # Which of equal ones are kept is mlx-lm's accident; here the first are.
        assert found == set(range(top_k))
    else:
        assert found == expected


def test_draws_follow_the_distribution() -> None:
    logits = mx.array([[1.0, 3.0, 2.0, -1.0, float("-inf"), 0.5]])
    draws = np.bincount(drawn(logits, range(6000), 0.8), minlength=6) / 6000
    expected = np.array(mx.softmax(logits / 0.8, axis=-1))[0]
    assert np.abs(draws - expected).max() < 0.02
    assert draws[4] == 0


@pytest.mark.parametrize("n", [1, 2, 31, 32_768, 49_152, 151_936])
def test_vocabularies_of_every_size(n: int) -> None:
    logits = mx.random.normal((1, n), key=mx.random.key(1)) * 4
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for top_p, top_k in ((0.0, 0), (0.9, 0), (0.9, 30), (0.0, 30)):
        k = top_k if top_k < n else 0
        sampler = make_sampler(temp=0.7, top_p=top_p, top_k=k)
        differ = 0
        for seed in range(6):
            mx.random.seed(seed)
            expected = sampler(logs).item()
            draw = extension.draw_token(logits, key_of(seed), inverse_temperature=1 / 0.7, top_p=top_p, top_k=k)
            differ += draw.item() != expected
        # Over so many tokens MLX's sum of float probabilities is off by more than one has.
        assert differ <= (0 if n < 500 or top_k else 1 if top_p else 3)


def test_a_row_in_another_layout_and_rows_without_a_largest() -> None:
    logits = mx.random.normal((1, 400))
    assert extension.draw_token(logits[:, ::2], 5).item() == extension.draw_token(logits[:, ::2] + 0, 5).item()
    for strange in (math.nan, -math.inf, math.inf):
        for filters in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}):
            assert 0 <= extension.draw_token(mx.full((1, 50), strange), 5, **filters).item() < 50
            row = mx.zeros((1, 50))
            row[0, 7] = strange
            assert 0 <= extension.draw_token(row, 5, **filters).item() < 50


def test_what_does_not_fit_is_refused() -> None:
    row = mx.zeros((1, 4))
    for scores, settings_ in (
        (mx.zeros((2, 4)), {}),
        (mx.zeros((4,)), {}),
        (mx.zeros((1, 4), mx.bfloat16), {}),
        (mx.zeros((1, 0)), {}),
        (row, {"top_p": 1.5}),
        (row, {"min_p": -0.1}),
        (row, {"top_k": -1}),
        (row, {"inverse_temperature": 0.0}),
    ):
        with pytest.raises(ValueError, match="draw_tokens? takes"):
            extension.draw_token(scores, 1, **settings_)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 400),
    seed=st.integers(0, 1000),
    penalty=st.sampled_from([0.5, 1.1, 3.0]),
    count=st.integers(0, 70),
    strided=st.booleans(),
)
def test_penalties_are_mlx_lm_s(n: int, seed: int, penalty: float, count: int, strided: bool) -> None:
    scores = mx.random.normal((1, 2 * n if strided else n), key=mx.random.key(seed))
    scores = scores[:, ::2] if strided else scores
    tokens = np.random.default_rng(seed).integers(0, n, count).tolist()
    before = scores + 0
    ours = extension.penalized(scores, tokens, penalty)
    assert mx.array_equal(scores, before)
    assert mx.allclose(ours, make_repetition_penalty(penalty, 100)(tokens, scores + 0), rtol=1e-6, atol=0)


def test_a_penalty_on_what_is_no_token_is_refused() -> None:
    for tokens in ([4], [-1, 2]):
        with pytest.raises(ValueError, match="penalized takes tokens of the vocabulary"):
            extension.penalized(mx.zeros((1, 4)), tokens, 1.1)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 16), n=st.integers(2, 3000), seed=st.integers(0, 1000), strided=st.booleans())
def test_rows_drawn_together_are_those_rows_alone(rows: int, n: int, seed: int, strided: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = 3 * mx.random.normal((rows, 2 * n if strided else n), key=mx.random.key(seed))
    scores = scores[:, ::2] if strided else scores
    last = rng.integers(0, n, rows).astype(np.uint32)
    kinds = [
        (0.0, 0.0, 0.0, 0),
        (1.0, 0.9, 0.0, 0),
        (2.0, 0.0, 0.1, 0),
        (0.7, 0.0, 0.0, min(40, n - 1)),
        (1.0, 0.0, 0.0, 0),
    ]
    draws, expected = [], []
    for row in range(rows):
        inverse_temperature, top_p, min_p, top_k = kinds[int(rng.integers(len(kinds)))]
        penalty = float(rng.choice([1.0, 1.5]))
        tokens = rng.integers(0, n, int(rng.integers(0, 20))).tolist()
        draws.append((seed + row, inverse_temperature, top_p, min_p, top_k, penalty, tokens))
        one = scores[row : row + 1]
        if penalty != 1:
            one = extension.penalized(one, [*tokens, int(last[row])], penalty)
        alone = (
            extension.draw_token(
                one, seed + row, inverse_temperature=inverse_temperature, top_p=top_p, min_p=min_p, top_k=top_k
            )
            if inverse_temperature
            else mx.argmax(one, axis=-1)
        )
        expected.append(alone.item())
    assert extension.draw_tokens(scores, draws, mx.array(last)).tolist() == expected


def test_draws_that_do_not_fit_the_rows_are_refused() -> None:
    plain = (1, 1.0, 0.0, 0.0, 0, 1.0, [])
    for scores, draws, last in (
        (mx.zeros((2, 4)), [plain], None),
        (mx.zeros((1, 4)), [(1, -1.0, 0.0, 0.0, 0, 1.0, [])], None),
        (mx.zeros((1, 4)), [(1, 1.0, 0.0, 0.0, 0, 0.0, [])], None),
        (mx.zeros((1, 4)), [(1, 1.0, 0.0, 0.0, 0, 1.1, [4])], None),
        (mx.zeros((1, 4)), [plain], mx.zeros((2,), mx.uint32)),
        (mx.zeros((1, 4)), [plain], mx.zeros((1,), mx.int32)),
    ):
        with pytest.raises(ValueError, match="draw_tokens takes"):
            extension.draw_tokens(scores, draws, last)
