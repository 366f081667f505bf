"""What the benchmarks keep and show: figures against bars, parts merged into a file, the README's table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import common, kept, readme, report
from benchmarks.common import Comparison, Side


def side(*readings: float, unit: str = "ms") -> Side:
    return Side("somebody", "", unit, readings)


@pytest.mark.parametrize(
    ("comparison", "figure", "met"),
    [
        (Comparison("rate", side(30), side(10), 2.5), 3.0, True),
        (Comparison("time", side(10), side(30), 3.5, less_is_better=True), 3.0, False),
        (Comparison("share", side(12), side(10), 1.5, less_is_better=True, form="share"), 1.2, True),
        (Comparison("share", side(16), side(10), 1.5, less_is_better=True, form="share"), 1.6, False),
        (Comparison("difference", side(10.5), side(10), 0.3, form="difference"), 0.5, False),
        (Comparison("no bar", side(30), side(10)), 3.0, None),
    ],
)
def test_a_figure_is_held_against_its_bar(comparison: Comparison, figure: float, met: bool | None) -> None:
    assert comparison.figure == pytest.approx(figure)
    assert comparison.met is met


def test_sides_take_turns_and_a_slow_one_gets_fewer() -> None:
    order: list[str] = []

    def measure(name: str) -> dict[str, float]:
        order.append(name)
        return {"rate": 1.0}

    sides = {name: (lambda name=name: measure(name)) for name in ("a", "b")}
    readings = common.interleave(sides, 3, fewer={"b": 1}, log=False)
    assert order == ["a", "b", "a", "a"]
    assert [len(readings[name]) for name in ("a", "b")] == [3, 1]


def test_a_part_measured_again_leaves_the_others(tmp_path: Path) -> None:
    def save(part: str, reading: float) -> None:
        lines = [Comparison(part, side(reading), side(1.0, 2.0, 3.0))]
        kept.save("speed", part, lines, notes=[], conditions={"read_bandwidth_gb_s": [30.0]}, folder=tmp_path)

    save("one", 1.0)
    save("two", 2.0)
    save("one", 3.0)
    parts = json.loads((tmp_path / "speed.json").read_text())["parts"]
    assert {name: kept.comparisons(part)[0].ours.median for name, part in parts.items()} == {"one": 3.0, "two": 2.0}
    again = kept.comparisons(parts["two"])[0]
    assert (again.peer.readings, again.peer.spread) == ((1.0, 2.0, 3.0), 1.0)


@pytest.mark.parametrize(
    ("rates", "readings", "disturbed"),
    [((30.0, 29.0), (10.0, 10.5), False), ((30.0, 20.0), (10.0, 10.5), True), ((30.0, 29.0), (10.0, 14.0), True)],
)
def test_a_disturbed_part_is_recognised(
    rates: tuple[float, ...], readings: tuple[float, ...], disturbed: bool, tmp_path: Path
) -> None:
    lines = [Comparison("x", side(*readings), side(10.0))]
    path = kept.save("x", "p", lines, notes=[], conditions={"read_bandwidth_gb_s": list(rates)}, folder=tmp_path)
    assert ("DISTURBED" in report.quietness(json.loads(path.read_text())["parts"]["p"])) is disturbed


def test_a_machine_that_is_slow_all_through_a_part_is_recognised(tmp_path: Path) -> None:
    lines = [Comparison("x", side(10.0, 10.5), side(10.0))]
    path = kept.save("x", "p", lines, notes=[], conditions={"read_bandwidth_gb_s": [16.0, 15.8]}, folder=tmp_path)
    part = json.loads(path.read_text())["parts"]["p"]
    assert "DISTURBED" not in report.quietness(part)
    assert "DISTURBED" in report.quietness(part, best=30.0)


def test_other_files_among_the_results_are_no_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    kept.save("speed", "one", [Comparison("x", side(1.0), side(2.0))], notes=[], conditions={}, folder=tmp_path)
    (tmp_path / "recipe.json").write_text('{"loss": 1.0}')
    assert kept.names() == ["speed"]
    assert report.best_bandwidth().popitem()[1] == 0.0


@pytest.mark.skipif(not common.RESULTS.exists(), reason="a source package has no results")
def test_the_readme_says_what_the_results_say() -> None:
    text = readme.README.read_text("utf-8")
    assert readme.written(text) == text, "run: python -m benchmarks.readme"
