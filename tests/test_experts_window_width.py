"""The expected time of a token in windows, and the width that is chosen from what was seen."""

from __future__ import annotations

import random

import numpy as np
import pytest

from edger1.experts.window_width import Costs, WidthController, best_width, candidates, token_seconds

SYNC, COMPUTE = 2e-3, 0.44e-3


def speedup(width: int, hit: float, layers: int = 600) -> float:
    full_hits = [hit] * layers
    return token_seconds(1, full_hits, SYNC, COMPUTE) / token_seconds(width, full_hits, SYNC, COMPUTE)


def played(width: int, full_hits: list[float], rng: random.Random) -> float:
    """The time of one token, layer by layer, as the layers themselves would have it."""
    seconds, unchecked = 0.0, []
    hits = [rng.random() < p for p in full_hits]
    for layer in range(len(hits)):
        seconds += COMPUTE
        unchecked.append(layer)
        while unchecked and (len(unchecked) >= width or layer == len(hits) - 1):
            seconds += SYNC
            missed = next((u for u in unchecked if not hits[u]), None)
            if missed is None:
                unchecked = []
                break
            again = [u for u in unchecked if u >= missed]
            seconds += COMPUTE * len(again)
            hits[missed], unchecked = True, again[1:]
    return seconds


@pytest.mark.parametrize(("width", "layers"), [(2, 7), (3, 7), (5, 12), (12, 12)])
def test_expected_time_is_the_mean_of_what_happens(width: int, layers: int) -> None:
    rng = random.Random(width)
    full_hits = [0.5 + 0.4 * (layer % 3) / 2 for layer in range(layers)]
    times = [played(width, full_hits, rng) for _ in range(4000)]
    error = np.std(times) / len(times) ** 0.5
    assert np.mean(times) == pytest.approx(token_seconds(width, full_hits, SYNC, COMPUTE), abs=4 * error)


@pytest.mark.parametrize(("hit", "width", "others", "ours"), [(0.80, 5, 1.95, 1.82), (0.57, 3, 1.39, 1.26)])
def test_speedups_that_others_computed_count_the_missing_layer_once(
    hit: float, width: int, others: float, ours: float
) -> None:
    per_check = (1 - hit**width) / (1 - hit)
    assert (SYNC + COMPUTE) * per_check / (SYNC + width * COMPUTE) == pytest.approx(others, abs=5e-3)
    assert speedup(width, hit) == pytest.approx(ours, abs=5e-3)
    assert best_width([hit] * 48, SYNC, COMPUTE) == width


def test_a_whole_token_at_once_loses_where_windows_pay() -> None:
    assert speedup(48, 0.8, 48) < 1 < speedup(5, 0.8, 48)
    assert speedup(48, 0.57, 48) < 0.5 < 1 < speedup(3, 0.57, 48)


@pytest.mark.parametrize(
    ("hit", "sync", "width"),
    [(1.0, SYNC, 48), (0.0, SYNC, 1), (0.9, 0.0, 1), (0.999, SYNC, 48), (0.3, 0.2e-3, 1)],
)
def test_the_best_width_where_it_is_known(hit: float, sync: float, width: int) -> None:
    assert best_width([hit] * 48, sync, COMPUTE) == width


def test_layers_that_differ_are_counted_as_they_are() -> None:
    uneven = [1.0, 0.2] * 12
    assert token_seconds(2, uneven, SYNC, COMPUTE) != pytest.approx(token_seconds(2, [0.6] * 24, SYNC, COMPUTE))
    assert token_seconds(4, [], SYNC, COMPUTE) == 0
    assert candidates(1) == [1]
    assert candidates(48)[:9] == [1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_costs_are_told_apart_only_by_different_numbers_of_layers() -> None:
    costs = Costs()
    for _ in range(50):
        costs.add(4, SYNC + 4 * COMPUTE)
    assert costs.estimates is None
    costs.add(3, SYNC + 3 * COMPUTE)
    assert costs.estimates == pytest.approx((SYNC, COMPUTE), rel=1e-6)
    for _ in range(1000):
        costs.add(4, 0.5e-3 + 4 * COMPUTE)
        costs.add(6, 0.5e-3 + 6 * COMPUTE)
    assert costs.estimates == pytest.approx((0.5e-3, COMPUTE), rel=0.02), "an old cost is not forgotten"


def drive(controller: WidthController, tokens: int, hit: float, sync: float, rng: random.Random) -> list[int]:
    """Tokens of 48 layers as windows would report them, with a tenth of noise on the times."""
    layers, widths = list(range(48)), []
    for _ in range(tokens):
        width = controller.next(layers, 50)
        widths.append(width)
        for layer in layers:
            controller.hit(layer, rng.random() < hit)
        for _ in range(len(layers) // width):
            controller.costs.add(width, (sync + width * COMPUTE) * rng.uniform(0.9, 1.1))
    return widths


@pytest.mark.parametrize(("hit", "sync"), [(0.8, SYNC), (0.57, SYNC), (0.95, 1e-3), (0.5, 0.05e-3), (0.99, 3e-3)])
def test_the_controller_finds_a_width_as_good_as_the_best(hit: float, sync: float) -> None:
    controller = WidthController(48)
    widths = drive(controller, 300, hit, sync, random.Random(1))
    full_hits = [hit] * 48
    best = token_seconds(best_width(full_hits, sync, COMPUTE), full_hits, sync, COMPUTE)
    assert widths[0] == 1
    assert token_seconds(controller.width, full_hits, sync, COMPUTE) < 1.05 * best
    assert len(set(widths[-64:])) > 1, "without other widths the costs are no longer known"
    assert widths[-64:].count(controller.width) >= 56


def test_the_controller_follows_a_change() -> None:
    controller, rng = WidthController(48), random.Random(2)
    drive(controller, 200, 0.97, SYNC, rng)
    wide = controller.width
    drive(controller, 300, 0.4, SYNC, rng)
    assert controller.width <= 3 < wide
    drive(controller, 300, 0.97, SYNC, rng)
    assert controller.width > 5


def test_no_more_layers_than_may_miss() -> None:
    controller = WidthController(48)
    drive(controller, 100, 1.0, SYNC, random.Random(3))
    assert controller.width == 48
    assert controller.next([4, 9], 50) == 2
    assert controller.next([], 50) == 1
