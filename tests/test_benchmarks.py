"""What the benchmarks keep and show: figures against bars, parts merged into a file, the README's table."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from children import LIMIT_S, child

from benchmarks import (
    cgroup,
    common,
    kept,
    peers,
    peers_streaming,
    random_llama,
    random_moe,
    readme,
    report,
    skewed_routing,
)
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


def test_a_random_models_routes_are_skewed_and_repeat() -> None:
    law = skewed_routing.Law()
    text = skewed_routing.text(law, 5000, range(20, 4500), np.random.default_rng(0))
    made = skewed_routing.Directions(law, text, 256)
    ids = np.array(text.recited(int(text.order[0]), 800))
    skew = skewed_routing.measure(made.routes(ids, 0, 128, 8), 128)
    even = skewed_routing.measure(np.random.default_rng(0).integers(0, 128, (800, 8)), 128)
    assert skew.share_of_top_quarter > 0.5 > even.share_of_top_quarter
    assert skew.kept_from_token_to_token > 0.2 > even.kept_from_token_to_token
    assert 0.8 < skew.lru_50 < 0.97
    assert 0.55 < skew.lru_25 < 0.85
    assert even.lru_25 == pytest.approx(0.25, abs=0.05)


def test_a_random_models_output_head_recites_the_text() -> None:
    law = skewed_routing.Law()
    text = skewed_routing.text(law, 600, range(17, 500), np.random.default_rng(0))
    made = skewed_routing.Directions(law, text, 512)
    everything = np.arange(600)
    scores = made.embeddings(text.order) @ made.heads(everything).T
    assert scores.argmax(axis=1).tolist() == text.successors()[text.order].tolist()
    assert sorted(text.recited(int(text.order[7]), len(text.order))) == sorted(text.order.tolist())


def test_lru_is_hit_where_experts_come_back() -> None:
    routes = np.array([[0, 1], [2, 3]] * 10)
    assert skewed_routing.lru_hit_rate(routes, 4) == 1.0
    assert skewed_routing.lru_hit_rate(routes, 3) == 0.0


def test_q4_0_blocks_hold_the_rows_they_were_made_of() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    rows = np.random.default_rng(0).standard_normal((4, 128), np.float32)
    packed = random_moe.q4_0(rows)
    kept = dequantize(packed, GGMLQuantizationType.Q4_0)
    assert np.abs(kept - rows).max() < np.abs(rows).max() / 8
    assert np.array_equal(packed, quantize(rows, GGMLQuantizationType.Q4_0))


def test_random_q4_0_weights_are_centred_and_of_the_usual_size() -> None:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    weights = dequantize(random_llama.q4_0(64, 1024, np.random.default_rng(0), 0.5), GGMLQuantizationType.Q4_0)
    assert weights.std() * 1024**0.5 == pytest.approx(0.5, rel=0.02)
    assert abs(weights.mean()) < 0.01 * weights.std()


def test_a_limit_is_read_in_both_versions_of_cgroups() -> None:
    v1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"
    v2 = "low 0\nhigh 0\nmax 12\noom 4\noom_kill 2\noom_group_kill 0\n"
    assert [cgroup.field(text, "oom_kill") for text in (v1, v2)] == [3, 2]
    assert (cgroup.field(v2, "max"), cgroup.field(v2, "swap")) == (12, 0)


def test_resident_memory_is_told_from_mapped() -> None:
    status = (
        "Name:\tx\nVmHWM:\t  900 kB\nVmRSS:\t  800 kB\nRssAnon:\t  500 kB\nRssFile:\t  250 kB\nRssShmem:\t  50 kB\n"
    )
    assert cgroup.resident(status) == cgroup.Resident(900 << 10, 800 << 10, 500 << 10, 300 << 10)


def taking(group: cgroup.Limited, nbytes: int) -> tuple[int, cgroup.Taken]:
    """Let a process fill so much memory; return how it ended and what the group took."""
    program = "import mmap, sys; n = int(sys.argv[1]); mmap.mmap(-1, n).write(bytes(n))"
    command = group.command([sys.executable, "-c", program, str(nbytes)])
    code = subprocess.run(command, check=False, timeout=LIMIT_S).returncode
    return code, group.taken()


def test_a_limit_kills_what_exceeds_it_and_nothing_stays() -> None:
    with ExitStack() as stack:
        try:
            group = stack.enter_context(cgroup.Limited(64 << 20))
        except cgroup.LimitUnavailableError as error:
            pytest.skip(str(error))
        code, within = taking(group, 20 << 20)
        killed, beyond = taking(group, 200 << 20)
        waits = group.command([sys.executable, "-c", "import time; print(flush=True); time.sleep(600)"])
        with child(waits, stdout=subprocess.PIPE) as left:
            assert left.stdout is not None
            left.stdout.readline()
            stack.close()
            assert left.wait(30) == -9
    assert (code, within.oom_kills) == (0, 0)
    assert 20 << 20 < within.peak_bytes <= 64 << 20
    assert (killed, beyond.oom_kills) == (-9, 1)


def test_llama_completions_account_is_read() -> None:
    said = (
        "x: prompt eval time =     200.00 ms /     8 tokens (   25.00 ms per token,    40.00 tokens per second)\n"
        "x:        eval time =    1000.00 ms /    15 runs   (   66.67 ms per token,    15.00 tokens per second)\n"
    )
    assert peers_streaming.timings(said) == {"prompt eval": 40.0, "eval": 15.0}
    with pytest.raises(peers.PeerMissingError):
        peers_streaming.timings("killed")
