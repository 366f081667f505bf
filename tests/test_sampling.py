"""Sampling settings: precedence, bounds, and draws that follow the distribution asked for."""

from __future__ import annotations

import pytest

from edger1 import sampling
from edger1.errors import UsageError
from edger1.messages import Sampling
from edger1.sampling import RandomState, Sampler


def test_the_request_wins_over_the_registry_and_the_registry_over_the_model() -> None:
    asked, registry, model = Sampling(top_p=0.5), Sampling(temperature=0.6, top_p=0.95), Sampling(top_k=20, top_p=0.1)
    resolved = sampling.resolve(asked, registry, model)
    assert (resolved.top_p, resolved.temperature, resolved.top_k) == (0.5, 0.6, 20)
    assert sampling.resolve().temperature == 0


def test_a_zero_is_a_choice_and_not_an_absence() -> None:
    assert sampling.resolve(Sampling(temperature=0.0), Sampling(temperature=0.7)).temperature == 0.0


def test_nonsense_in_generation_config_is_left_out() -> None:
    read = sampling.from_generation_config({"temperature": "hot", "top_p": 0.9, "top_k": -3})
    assert read == Sampling(top_p=0.9)
    assert sampling.from_generation_config({"do_sample": False, "temperature": 0.7}).temperature == 0


@pytest.mark.parametrize("stop", [5, [5], [None], {"a": 1}, "", [""]])
def test_stop_must_be_strings(stop: object) -> None:
    with pytest.raises(UsageError, match="list of non-empty strings"):
        sampling.check_stop(stop)


def draw(settings: Sampling, logits: list[float], draws: int = 400) -> list[int]:
    import mlx.core as mx

    sampler = Sampler(settings, len(logits))
    RandomState.seeded(1).enter(None)
    return [int(sampler(mx.array([logits]), []).item()) for _ in range(draws)]


def test_draws_follow_temperature_and_cuts() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    assert set(draw(Sampling(temperature=0.0), logits, 5)) == {0}
    hot = draw(Sampling(temperature=1.0), logits)
    # softmax gives 0.64, 0.24, 0.09, 0.03; three standard deviations of 400 draws are 0.07.
    assert abs(hot.count(0) / 400 - 0.64) < 0.075
    assert set(draw(Sampling(temperature=5.0, top_k=2), logits)) == {0, 1}
    assert set(draw(Sampling(temperature=5.0, top_p=0.8), logits)) == {0, 1}
    assert set(draw(Sampling(temperature=5.0, min_p=0.3), logits)) == {0, 1}
    assert set(draw(Sampling(temperature=5.0, top_k=10**6), logits)) == {0, 1, 2, 3}


@pytest.mark.parametrize("temperature", [1e-20, 1e-30, 1e-40, 5e-324])
def test_next_to_no_temperature_draws_the_likeliest_token(temperature: float) -> None:
    logits = [-20.0, 90.0, 89.9, 3.0]
    assert set(draw(Sampling(temperature=temperature, top_p=0.9), logits, 20)) == {1}


def test_repetition_is_discouraged() -> None:
    import mlx.core as mx

    sampler = Sampler(Sampling(temperature=0.0, repetition_penalty=3.0), 3)
    assert sampler.looks_back
    assert int(sampler(mx.array([[2.0, 1.0, 0.0]]), [0]).item()) == 1


def test_each_request_keeps_its_own_random_state() -> None:
    import mlx.core as mx

    def numbers(state: RandomState, previous: RandomState | None) -> list[float]:
        state.enter(previous)
        return mx.random.uniform(shape=(2,)).tolist()

    alone = RandomState.seeded(5)
    expected = numbers(alone, None) + numbers(alone, alone)
    one, other = RandomState.seeded(5), RandomState.seeded(6)
    first = numbers(one, None)
    numbers(other, one)
    assert first + numbers(one, other) == expected


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(temperature=0.8),
        Sampling(temperature=0.8, top_p=0.9),
        Sampling(temperature=0.8, top_k=20),
        Sampling(temperature=0.8, min_p=0.1),
        Sampling(temperature=0.8, top_p=0.95, top_k=40, min_p=0.02, repetition_penalty=1.2),
    ],
    ids=str,
)
def test_a_seed_gives_the_same_tokens_with_kernels_and_without(settings: Sampling) -> None:
    import mlx.core as mx

    from edger1 import kernels
    from edger1.kernels import functions
    from edger1.mlx_runtime import prepare

    extension = kernels._load()[0]
    if extension is None:
        pytest.skip("the kernels are not built")
    prepare()
    rows = [3 * mx.random.normal((1, 300), key=mx.random.key(i)) for i in range(40)]
    sampler = Sampler(settings, 300)

    def answer() -> list[int]:
        RandomState.seeded(11).enter(None)
        return [int(sampler(row + 0, list(range(i))).item()) for i, row in enumerate(rows)]

    plain = answer()
    functions.acquire(extension)
    try:
        assert answer() == plain
    finally:
        functions.release()
