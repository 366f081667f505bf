"""What waiting for a device costs, and the wired limit of a Mac, with a made-up device and a made-up MLX."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from edger1.experts.device import MLXDevice, SimulatedDevice  # noqa: E402
from edger1.experts.wired import MARGIN_BYTES, Wired, wired_limit  # noqa: E402

GB = 2**30


@pytest.mark.parametrize("device", [MLXDevice(), SimulatedDevice(0.0, 0.0)])
def test_a_read_back_computes_and_copies(device: Any) -> None:
    array = mx.arange(6, dtype=mx.uint32).reshape(2, 3) + 1
    read = device.read_back(array)
    assert (read.dtype, read.tolist()) == (np.uint32, [[1, 2, 3], [4, 5, 6]])


def test_virtual_time_is_what_was_charged() -> None:
    device = SimulatedDevice(2e-3, 0.5e-3)
    began, clock = device.now(), time.perf_counter()
    device.computed(60_000)
    device.read_back(mx.array([1]))
    assert device.now() - began == pytest.approx(30.002)
    assert time.perf_counter() - clock < 15
    assert (device.read_backs, device.layers) == (1, 60_000)


def test_charges_can_be_slept() -> None:
    device = SimulatedDevice(20e-3, 10e-3, sleep=True)
    began = device.now()
    device.computed(2)
    device.read_back(mx.array([1]))
    assert device.now() - began >= 40e-3


class FakeMLX:
    """MLX on a Mac with `recommended` bytes, whose limit was `limit`."""

    def __init__(self, recommended: int | None, limit: int = 0, error: Exception | None = None) -> None:
        self.metal, self.recommended, self.limit, self.error = self, recommended, limit, error
        self.log: list[str] = []

    def is_available(self) -> bool:
        return self.recommended is not None

    def device_info(self) -> dict[str, Any]:
        return {"max_recommended_working_set_size": self.recommended}

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def set_wired_limit(self, limit: int) -> int:
        if self.error is not None:
            raise self.error
        self.log.append(str(limit))
        before, self.limit = self.limit, limit
        return before


@pytest.mark.parametrize(
    ("held", "recommended", "limit"),
    [
        (4 * GB, 24 * GB, 4 * GB + MARGIN_BYTES),
        (23 * GB, 24 * GB, 21 * GB),
        (30 * GB, 24 * GB, 21 * GB),
        (5 * GB, 5 * GB, 4 * GB),
        (5 * GB, GB // 2, 0),
    ],
)
def test_the_limit_is_what_is_held_and_never_all(held: int, recommended: int, limit: int) -> None:
    assert wired_limit(held, recommended) == limit
    assert limit < recommended


def test_the_limit_follows_what_is_held_and_goes_back() -> None:
    fake = FakeMLX(24 * GB, limit=123)
    with Wired(fake) as wired:
        wired.hold("a model", 4 * GB)
        assert fake.limit == wired.limit_bytes == 4 * GB + MARGIN_BYTES
        wired.hold("another", 2 * GB)
        wired.hold("a model", 3 * GB)
        assert fake.limit == 5 * GB + MARGIN_BYTES
        wired.hold("another", 0)
        assert fake.limit == 3 * GB + MARGIN_BYTES
        set_so_far = len(fake.log)
        wired.hold("a model", 3 * GB)
        assert len(fake.log) == set_so_far, "an unchanged limit was set again"
    assert (fake.limit, wired.limit_bytes) == (123, None)
    assert fake.log[::2] == ["synchronize"] * (len(fake.log) // 2), "nothing may be computed meanwhile"


def test_the_last_model_that_goes_gives_the_limit_back() -> None:
    fake = FakeMLX(24 * GB, limit=7)
    wired = Wired(fake)
    wired.hold("a model", GB)
    wired.hold("a model", 0)
    assert fake.limit == 7
    wired.hold("a model", GB)
    wired.close()
    wired.close()
    assert fake.limit == 7


@pytest.mark.parametrize(
    ("fake", "reason"),
    [(FakeMLX(None), "not an Apple GPU"), (FakeMLX(24 * GB, error=ValueError("over the system's")), "over the system")],
)
def test_nothing_is_set_where_it_cannot_be(fake: FakeMLX, reason: str) -> None:
    with Wired(fake) as wired:
        wired.hold("a model", 4 * GB)
        assert wired.limit_bytes is None
        assert reason in wired.reason
    assert fake.limit == 0


def test_this_machine_is_left_alone_or_given_back() -> None:
    before = mx.set_wired_limit(0)
    mx.set_wired_limit(before)
    with Wired() as wired:
        wired.hold("a model", 2**20)
        assert (wired.limit_bytes is not None) == mx.metal.is_available()
    assert mx.set_wired_limit(before) == before
