"""The plan of a whole model: the library's `plan`, the rates behind its prediction, and `edger1 plan`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import edger1 as command
from command_line import refused
from tiny import write_mixture

import edger1
from edger1 import paths
from edger1.experts import page_cache, rates
from edger1.experts.anatomy import LayerExperts, Part
from edger1.units import format_bytes

WEIGHTS, DISK = 2e9, 1e8
EXPERT = 3 * 128 * 192 * 4
EMBEDDING = 300 * 128 * 4


@pytest.fixture
def known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measure_weights", lambda *_: WEIGHTS)
    monkeypatch.setattr(rates, "measure_disk", lambda *_: DISK)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.mark.usefixtures("known_rates")
def test_a_plan_of_a_mixture_of_experts(mixture: Path) -> None:
    plan = edger1.plan(mixture)
    assert plan.slots is None
    least = plan.smallest_ceiling_bytes
    assert least < plan.total_bytes < plan.ceiling_bytes
    streamed = edger1.plan(mixture, memory=least + 2 * 3 * EXPERT + 1000)
    assert streamed.slots is not None
    slots = streamed.slots[0]
    assert streamed.slots == (slots, slots)
    assert slots > 2
    assert 0 <= streamed.ceiling_bytes - streamed.total_bytes < 2 * EXPERT
    assert streamed.smallest_ceiling_bytes == least
    edger1.plan(mixture, memory=least).check("mixture")
    assert streamed.stream is not None
    assert streamed.stream.hit_rate == pytest.approx(slots / 64)
    assert plan.resident_bytes - streamed.resident_bytes == 2 * 64 * EXPERT
    # Two experts a layer, some of which are there, and the rest of the weights but for the embedding.
    read = streamed.resident_bytes - EMBEDDING
    missed = 2 * 2 * EXPERT * (64 - slots) / 64
    assert streamed.prediction is not None
    assert 1 / streamed.prediction.tokens_per_s == pytest.approx((read + missed) / WEIGHTS + missed / DISK)
    assert plan.prediction is not None
    assert 1 / plan.prediction.tokens_per_s == pytest.approx((read + 2 * 2 * EXPERT) / WEIGHTS)
    assert plan.prediction.disk_bytes_per_s is None
    with pytest.raises(edger1.MemoryCeilingError, match=f"needs {format_bytes(least, up=True)} of memory"):
        edger1.plan(mixture, memory=least - 1).check("mixture")


@pytest.mark.usefixtures("known_rates")
@pytest.mark.usefixtures("known_rates")
def test_nothing_is_lent_that_cannot_be_given_back(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = edger1.plan(mixture).smallest_ceiling_bytes + 2 * 3 * EXPERT
    lent = edger1.plan(mixture, memory=memory).stream
    assert lent is not None
    monkeypatch.setattr(page_cache, "sys", SimpleNamespace(platform="darwin"))
    kept = edger1.plan(mixture, memory=memory).stream
    assert kept is not None
    assert kept.slots == lent.slots == kept.lent_slots
    assert sum(lent.lent_slots) > sum(lent.slots)


def test_every_ceiling_from_the_smallest_on_works() -> None:
    # The experts of nano-moe take hardly more than the buffers that streaming them needs.
    most = edger1.plan("nano-moe").total_bytes
    least = edger1.plan("nano-moe").smallest_ceiling_bytes
    for ceiling in range(least, most, (most - least) // 20):
        plan = edger1.plan("nano-moe", memory=ceiling)
        plan.check("nano-moe")
        assert plan.smallest_ceiling_bytes == least
    assert edger1.plan("nano-moe", memory=least - 1).total_bytes == least


@pytest.mark.usefixtures("known_rates")
def test_a_plan_with_slots_by_hand(tiny_folder: Path) -> None:
    assert edger1.plan("nano-moe", expert_slots="25%").slots == (8,) * 5
    assert edger1.plan("nano-moe", expert_slots=100).slots == (32,) * 5
    with pytest.raises(edger1.UsageError, match="4 or more"):
        edger1.plan("nano-moe", expert_slots=3)
    with pytest.raises(edger1.UsageError, match="has none"):
        edger1.plan(tiny_folder, expert_slots=3)


def test_rates_are_kept_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    def measure(*_: Any) -> float:
        measured.append(1e9)
        return 1e9

    monkeypatch.setattr(rates, "measure_weights", measure)
    assert rates.weight_rate({"bits": 4, "group_size": 64}) == rates.weight_rate({"bits": 4, "group_size": 64}) == 1e9
    assert len(measured) == 1
    rates.weight_rate({"bits": 8, "group_size": 64})
    rates.weight_rate(None)
    assert len(measured) == 3
    kept = paths.data() / "rates.json"
    content = json.loads(kept.read_text(encoding="utf-8"))
    for entry in content["rates"].values():
        entry["when"] -= 25 * 3600
    kept.write_text(json.dumps(content), encoding="utf-8")
    rates.weight_rate(None)
    assert len(measured) == 4


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 9}', '{"version": 1, "rates": 3}', '{"version": 1, "rates": {"x": {"when": NaN}}}'],
)
def test_a_damaged_file_of_rates_is_written_anew(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measure_weights", lambda *_: 1e9)
    kept = paths.data() / "rates.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(content, encoding="utf-8")
    assert rates.weight_rate(None) == 1e9
    assert len(json.loads(kept.read_text(encoding="utf-8"))["rates"]) == 1


def test_a_data_folder_that_cannot_be_written_costs_a_measurement_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "measure_weights", lambda *_: 1e9)
    paths.data().parent.mkdir(parents=True)
    paths.data().write_text("a file where a folder should be", encoding="utf-8")
    assert rates.weight_rate(None) == 1e9


def test_rates_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(os.urandom(1 << 20))
    part = Part("up_proj", "weight", file, 100, 100_000, (25, 1000), "F32")
    layer = LayerExperts(0, "mlp", 10, 2, (part,))
    assert (rates.measure_disk([layer], seconds=0.05) or 0) > 1e5
    for bits, group in ((4, 64), (16, 0)):
        assert 1e6 < rates.measure_weights(bits, group, "fast", seconds=0.01) < 1e12
    # A file that ends too early has no rate, and one that is not there neither.
    file.write_bytes(b"short")
    assert rates.measure_disk([layer], seconds=0.05) is None
    file.unlink()
    assert rates.disk_rate([layer]) is None


def test_the_command_tells_what_is_streamed() -> None:
    done = command("plan", "nano-moe", "--expert-slots", "25%")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "8 of 32 experts in each of 5 layers" in done.stdout
    assert "25%, as if all experts were used alike" in done.stdout
    for words in ("resident weights", "smallest ceiling", "tokens/s", "the disk at"):
        assert words in done.stdout
    found = json.loads(command("plan", "nano-moe", "--expert-slots", "25%", "--json").stdout)
    assert found["model"] == "nano-moe"
    assert found["slots"] == [8] * 5
    assert found["fits"]
    assert found["prediction"]["tokens_per_s"] > 0
    assert found["smallest_ceiling_bytes"] < found["total_bytes"]


def test_the_command_on_a_dense_model(tiny_folder: Path) -> None:
    done = command("plan", str(tiny_folder), "--memory", "2GB", "--context", "100")
    assert done.returncode == 0, done.stderr
    assert "a context of 100 tokens, under a ceiling of 2.00 GB" in done.stdout
    assert "expert" not in done.stdout


def test_the_command_refuses_what_does_not_fit_after_the_plan() -> None:
    done = command("plan", "nano-moe", "--memory", "100MB", "--json")
    assert done.returncode == 1
    assert not json.loads(done.stdout)["fits"]
    assert done.stderr.startswith("edger1: nano-moe with a context of 1024 tokens needs ")
    refused(command("plan", "nano-moe", "--expert-slots", "none"), 2, "expert_slots is 'none'")
    refused(command("plan", "no-such-model"), 2, "no-such-model")
