"""pass@k, maj@k and intervals, against counting every case."""

from __future__ import annotations

import math
from itertools import combinations
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edger1.tasks.estimates import difference, maj_at_k, mcnemar, mean, pass_at_k, wilson


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_choices(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    counted = [any(chosen) for chosen in combinations(right, k)]
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(counted) / len(counted))


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=7), st.data())
def test_maj_at_k_is_the_mean_over_all_votes(keys: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(keys)))
    right = [key == "a" for key in keys]

    def vote(chosen: tuple[str | None, ...]) -> float:
        counts = {key: chosen.count(key) for key in set(chosen) - {None}}
        leading = [key for key, count in counts.items() if count == max(counts.values())]
        return leading.count("a") / len(leading) if leading else 0.0

    counted = [vote(chosen) for chosen in combinations(keys, k)]
    assert maj_at_k(keys, right, k) == pytest.approx(sum(counted) / len(counted))


def test_maj_at_k_of_many_samples_is_close_to_all_choices() -> None:
    random = Random(1)
    keys = [random.choice("aab") for _ in range(14)]
    right = [key == "a" for key in keys]
    exact = [sum(good for good in chosen) > 3 for chosen in combinations(right, 7)]
    assert maj_at_k(keys, right, 7) == pytest.approx(sum(exact) / len(exact), abs=0.08)
    assert maj_at_k(keys, right, 7) == maj_at_k(keys, right, 7)


def test_k_of_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@3"):
        pass_at_k(2, 1, 3)
    with pytest.raises(ValueError, match="maj@3"):
        maj_at_k(["a"], [True], 3)


def test_wilson_holds_its_equation() -> None:
    # Each bound is the p for which the share lies z standard deviations away (Wilson 1927).
    for right, total in ((0, 10), (3, 10), (10, 10), (50, 200)):
        found = wilson(right, total)
        for bound in {found.low, found.high} - {0.0, 1.0}:
            assert abs(found.value - bound) == pytest.approx(
                1.959963984540054 * math.sqrt(bound * (1 - bound) / total), abs=1e-6
            )
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says() -> None:
    random = Random(3)
    covered = 0
    for _ in range(60):
        shares = [sum(random.random() < p for _ in range(4)) / 4 for p in (random.random() for _ in range(80))]
        found = mean(shares)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 50


def test_one_answer_a_question_has_wilsons_interval() -> None:
    assert mean([1.0, 0.0, 1.0]) == wilson(2, 3)
    assert mean([0.0] * 20).high > 0.1


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (5, 0), (3, 3), (9, 1), (2, 12)])
def test_mcnemar_counts_coin_throws(better: int, worse: int) -> None:
    total = better + worse
    as_far = [i for i in range(total + 1) if abs(i - total / 2) >= abs(better - total / 2)]
    assert mcnemar(better, worse) == pytest.approx(sum(math.comb(total, i) for i in as_far) / 2**total)


def test_many_questions_that_differ_are_counted_too() -> None:
    assert mcnemar(2000, 2000) == 1.0
    assert mcnemar(2500, 1500) < 1e-20


def test_differences_are_of_the_same_questions() -> None:
    random = Random(5)
    base = [float(random.random() < 0.5) for _ in range(200)]
    better = [1.0 if i % 10 == 0 else value for i, value in enumerate(base)]
    found = difference(better, base)
    gained = sum(b > a for a, b in zip(base, better, strict=True))
    assert (found.better, found.worse, found.value) == (gained, 0, pytest.approx(gained / 200))
    # Paired: far narrower than two accuracies of 200 questions, which are 7 points apart by chance alone.
    assert 0 < found.low < found.value < found.high < 0.1
    assert found.p < 0.01
    same = difference(base, base)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
