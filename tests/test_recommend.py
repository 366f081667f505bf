from __future__ import annotations

import pytest

from edger1 import registry
from edger1.estimate import Machine
from edger1.recommend import recommend

LAPTOP, MAC = Machine(gpu=False, kernels=True), Machine(gpu=True, kernels=False)
SIZES = (4, 8, 16, 24, 32, 64, 128)


@pytest.mark.parametrize("machine", [LAPTOP, MAC], ids=["laptop", "mac"])
@pytest.mark.parametrize("gigabytes", SIZES)
def test_every_machine_gets_models_that_it_can_run(gigabytes: int, machine: Machine) -> None:
    memory = gigabytes * 2**30
    found = recommend(registry.load().values(), memory, machine=machine)
    assert 1 <= len(found) <= 3
    assert found[0].role == "fits"
    assert len({each.entry.alias for each in found}) == len(found)
    for each in found:
        assert each.estimate.fit == ("streams" if each.role == "streams" else "fits")
        assert (each.estimate.needs_bytes or 0) <= 0.75 * memory
        assert each.tokens_per_s >= 0.5
        assert each.download_s == pytest.approx((each.entry.bytes or 0) / 12.5e6)
        assert each.why


@pytest.mark.parametrize("machine", [LAPTOP, MAC], ids=["laptop", "mac"])
def test_more_memory_never_recommends_a_lesser_model(machine: Machine) -> None:
    known = list(registry.load().values())
    sizes = [recommend(known, gb * 2**30, machine=machine)[0].entry.bytes or 0 for gb in SIZES]
    assert sizes == sorted(sizes)


def test_what_streams_is_more_than_what_fits() -> None:
    found = {each.role: each.entry for each in recommend(registry.load().values(), 16 * 2**30, machine=LAPTOP)}
    assert found["streams"].active_parameters is not None
    assert (found["streams"].bytes or 0) > (found["fits"].bytes or 0) > (found["small"].bytes or 0)


def test_reasoning_goes_before_an_older_model_of_the_same_size() -> None:
    aliases = {e.entry.alias for gb in SIZES for e in recommend(registry.load().values(), gb * 2**30, machine=MAC)}
    assert not aliases & {"mixtral-8x7b", "mixtral-8x22b", "deepseek-v2-lite-base", "bespoke-stratos-32b"}


def test_a_machine_that_can_run_nothing_is_recommended_nothing() -> None:
    assert recommend(registry.load().values(), 256 * 2**20, machine=LAPTOP) == []
    assert recommend([], 16 * 2**30, machine=LAPTOP) == []
