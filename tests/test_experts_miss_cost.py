"""What misses cost, from one run to the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edger1 import paths
from edger1.experts.anatomy import LayerExperts, Part
from edger1.experts.budget import plan_stream
from edger1.experts.miss_cost import MOST, MissCosts


def layer(index: int, nbytes: int = 1000) -> LayerExperts:
    part = Part("up_proj", "weight", Path("x"), 0, nbytes, (1, nbytes), "U8")
    return LayerExperts(index, f"layers.{index}", 16, 2, (part,))


def test_costs_are_measured_means_and_survive_the_run(tmp_path: Path) -> None:
    layers = [layer(0), layer(1)]
    costs = MissCosts(tmp_path, layers)
    assert costs.seconds() is None
    costs.add([10_000, 10_000], [10.0, 30.0])
    costs.save()
    first, second = MissCosts(tmp_path, layers).seconds() or []
    assert (first, second) == pytest.approx((0.001, 0.003), rel=0.05)
    assert MissCosts(tmp_path / "other", layers).seconds() is None
    # A model of another shape in the same folder starts anew.
    assert MissCosts(tmp_path, [*layers, layer(2)]).seconds() is None


def test_a_layer_with_few_misses_costs_what_its_size_makes_likely(tmp_path: Path) -> None:
    costs = MissCosts(tmp_path, [layer(0), layer(1, nbytes=3000), layer(2)])
    costs.add([1000, 0, 2], [1.0, 0.0, 5.0])
    first, second, third = costs.seconds() or []
    # 6 s for a million bytes, near enough: the second's experts are three times as large.
    assert second == pytest.approx(3 * 6e-3, rel=0.01)
    assert first < third < 5 / 2


def test_new_misses_outweigh_old_ones(tmp_path: Path) -> None:
    costs = MissCosts(tmp_path, [layer(0)])
    costs.add([10 * MOST], [10 * MOST])
    for _ in range(10):
        costs.add([MOST], [MOST / 1000])
    (cost,) = costs.seconds() or []
    assert cost < 0.01


def test_slots_go_where_misses_cost_most(tmp_path: Path) -> None:
    layers = [layer(0), layer(1)]
    costs = MissCosts(tmp_path, layers)
    costs.add([10_000, 10_000], [1.0, 100.0])
    plan = plan_stream(layers, 80_000, prefill_tokens=1, miss_cost_s=costs.seconds())
    assert plan.slots[1] > plan.slots[0]
    assert plan_stream(layers, 80_000, prefill_tokens=1).slots[0] - plan.slots[0] > 1


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', '{"version": 1, "models": {"%s": {"misses": [NaN]}}}'])
def test_a_damaged_file_is_ignored_and_written_anew(content: str, tmp_path: Path) -> None:
    file = paths.data() / "miss-costs.json"
    file.parent.mkdir(parents=True)
    file.write_text(content.replace("%s", str(tmp_path)), encoding="utf-8")
    costs = MissCosts(tmp_path, [layer(0)])
    assert costs.seconds() is None
    costs.add([500], [1.0])
    costs.save()
    assert json.loads(file.read_text(encoding="utf-8"))["models"][str(tmp_path)]["misses"] == [500]
